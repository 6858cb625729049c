"""Every YAML file in configs/ is a valid config of the stage it names, and a misspelt key in any of them is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from temper.cli.stages import CONFIGS, config_class, stage_of, typed_config
from temper.core.config import interpolate, read_yaml
from temper.core.errors import ConfigError

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted((ROOT / "configs").glob("**/*.yaml"))


def named(path: Path) -> str:
    return path.relative_to(ROOT / "configs").as_posix()


@pytest.mark.parametrize("path", FILES, ids=named)
def test_every_config_loads(path):
    assert type(typed_config(path)) is config_class(stage_of(path, read_yaml(path)))


@pytest.mark.parametrize("path", FILES, ids=named)
def test_a_misspelt_key_is_refused_with_its_line(path, tmp_path):
    copy = tmp_path / path.name
    text = path.read_text() + "\nstagee_x: 1\n"
    copy.write_text(text)
    with pytest.raises(ConfigError, match=rf"line {len(text.splitlines())}: unknown key 'stagee_x'"):
        typed_config(copy)


def stage_files(value: object) -> list[str]:
    """Every `config: file` inside a pipeline file."""
    if isinstance(value, dict):
        here = [value["config"]] if isinstance(value.get("config"), str) else []
        return here + [name for item in value.values() for name in stage_files(item)]
    return [name for item in value for name in stage_files(item)] if isinstance(value, list) else []


@pytest.mark.parametrize("path", [path for path in FILES if path.name.startswith("finops")], ids=named)
def test_every_file_that_a_pipeline_names_is_there(path):
    values = read_yaml(path)
    names = [*stage_files(values), values["release"]["gate"], *([values["release"]["student_gate"]] if values["release"].get("student_gate") else [])]
    assert names
    assert [name for name in names if not (path.parent / name).is_file()] == []


def test_every_stage_has_a_schema_with_described_types():
    for stage in CONFIGS:
        schema = config_class(stage).model_json_schema()
        assert schema["additionalProperties"] is False, stage
        assert schema["properties"], stage


def test_the_files_are_yaml_without_duplicate_keys():
    class Strict(yaml.SafeLoader):
        pass

    def mapping(loader, node):
        keys = [loader.construct_object(key) for key, _ in node.value]
        assert len(keys) == len(set(keys)), f"{node.start_mark}: a key is given twice: {keys}"
        return dict(loader.construct_pairs(node, deep=True))

    Strict.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, mapping)
    for path in FILES:
        assert interpolate(yaml.load(path.read_text(), Loader=Strict)), path
