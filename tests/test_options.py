import dataclasses

from transformers import HfArgumentParser
from transformers.hf_argparser import string_to_bool

from hf_noisekd import NoiseKDConfig
from hf_noisekd.cli.options import _as_text, config_options


def test_options_read_off_the_source_are_the_fields():
    assert set(config_options()) == {field.name for field in dataclasses.fields(NoiseKDConfig) if field.init}


def test_options_read_off_the_source_have_the_types_and_defaults_of_the_fields():
    actions = {action.dest: action for action in HfArgumentParser(NoiseKDConfig)._actions if action.nargs != 0}
    defaults = {field.name: field.default for field in dataclasses.fields(NoiseKDConfig)}
    for name, option in config_options().items():
        assert option.is_switch == (actions[name].type is string_to_bool), name
        assert option.is_list == (actions[name].nargs == "+"), name
        assert option.help == (actions[name].help or ""), name
        if option.default is not None:
            assert option.default == _as_text(defaults[name]), name
    assert config_options()["learning_rate"].default == "0.01"
