import json
from contextlib import suppress

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from hf_noisekd.cli.config_file import read_options, words

# Characters that YAML can hold without an escape of its own, which `yaml.safe_dump` would write.
TEXT = st.text(st.characters(exclude_categories=["C"]), max_size=20)
NAME = TEXT.filter(len).map(lambda name: name.replace("-", "_"))  # a-b and a_b are one option
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAME, inner, max_size=3),
    max_leaves=6,
)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "config.yaml"


@given(TEXT)
def test_a_text_is_read_as_it_was_written(path, text):
    path.write_text(yaml.safe_dump({"run_name": text, "folders": [text, "b"]}, allow_unicode=True), encoding="utf-8")
    options = read_options(str(path))
    assert words(options["run_name"], several=False) == [text]
    assert words(options["folders"], several=True) == [text, "b"]


@given(st.dictionaries(NAME, JSON, max_size=3))
def test_a_mapping_has_the_values_of_json(path, mapping):
    path.write_text(f"kwargs: {json.dumps(mapping, ensure_ascii=False)}\n", encoding="utf-8")
    (word,) = words(read_options(str(path))["kwargs"], several=False)
    assert json.loads(word) == mapping


@given(st.text("ab:-[]{}&*!#|>'\"\n 1.", max_size=30) | st.binary(max_size=20))
def test_any_file_is_read_or_refused(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with suppress(ValueError, yaml.YAMLError):
        options = read_options(str(path))
        assert all(isinstance(word, str) for value in options.values() for word in words(value, several=True))
