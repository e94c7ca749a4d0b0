"""Licences in the Hub's form: one of its list, or `other` with a name."""

import re
from typing import Any

# https://huggingface.co/docs/hub/repositories-licenses; the Hub refuses a card with another one.
_LISTED = """
apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0
bigcode-openrail-m afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc
cc0-1.0 cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0
cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0
cdla-sharing-1.0 cdla-permissive-1.0 cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1
agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0 lgpl lgpl-2.1 lgpl-3.0 isc lppl-1.3c ms-pl apple-ascl apple-amlr mpl-2.0
odc-by odbl openrail++ osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib pddl lgpl-lr deepfloyd-if-license llama2
gemma unknown other
"""
HUB_LICENSES = frozenset(_LISTED.split())


def card_license(text: str | None) -> dict[str, Any]:
    """Return a card's metadata for a licence: `license`, and `license_name` for one that the Hub does not list."""
    listed = (text or "").strip().lower()
    if not listed or listed in HUB_LICENSES:
        return {"license": listed} if listed else {}
    return {"license": "other", "license_name": re.sub(r"[^a-z0-9.]+", "-", listed).strip("-.") or "unnamed"}
