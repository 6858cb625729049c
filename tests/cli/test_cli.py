"""The command line: quick help, errors without a traceback, exit codes, JSON for programs."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

import temper.cli as cli
from temper.cli import judge
from temper.cli.run import run_file
from temper.core.errors import ConfigError, DataError
from temper.core.reports import Measure, Report
from temper.core.storage import write_json

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = (
    "run", "evaluate", "gate", "releases list", "releases show", "releases promote", "releases rollback", "releases history",
    "releases verify", "serve", "chat", "config schema", "data inspect", "data admit", "data formats", "data hash", "template check", "template diff",
)  # fmt: skip
RULE = "alpha: 0.05\nmin_count: 5\ncoverage: 1.0\ntargets:\n  - {metric: tools.recall, min: 0.5, by: point}\n"


@pytest.fixture
def temper(capsys):
    """Run one command in this process: (exit code, stdout, stderr)."""

    def run(*arguments: str | Path) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stopped:
            cli.main([str(item) for item in arguments])
        told = capsys.readouterr()
        return int(stopped.value.code or 0), told.out, told.err

    return run


def report(value: float) -> Report:
    cases = {f"task {number}": float(number < value * 10) for number in range(10)}
    recall = Measure(value=value, count=10, low=0.3, high=0.9, cases=cases)
    return Report(name="rl", model="m", model_hash="ab" * 32, split="dev", suite_hash="cd" * 32, dimensions={"tools": {"recall": recall}})


def test_help_is_quick_and_starts_without_torch():
    code = (
        "import sys, time; started = time.perf_counter(); sys.argv = ['temper', '--help']\n"
        "from temper.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "heavy = [name for name in ('torch', 'transformers', 'matplotlib', 'fastapi', 'sqlalchemy', 'pydantic') if name in sys.modules]\n"
        "print('HEAVY', heavy); print('SECONDS', time.perf_counter() - started)"
    )
    seconds = []
    for _ in range(3):  # the quickest of three: other work on the machine is not ours to measure
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
        assert "HEAVY []" in done.stdout
        seconds.append(float(done.stdout.split("SECONDS ")[1]))
    assert min(seconds) < 0.5


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example_of_itself(temper, command):
    code, out, _ = temper(*command.split(), "--help")
    assert code == 0
    assert f"Example: temper {command}" in " ".join(out.split())


@pytest.mark.parametrize("arguments", [["nonsense"], ["run"], ["run", "x.yaml", "--no-such-option"], ["releases", "promote", "abc"]])
def test_a_usage_error_is_exit_code_2(temper, arguments):
    code, _, err = temper(*arguments)
    assert code == 2
    assert "Traceback" not in err


def test_a_missing_config_says_what_and_what_to_do(temper, tmp_path):
    (tmp_path / "sft.yaml").write_text("stage: sft\n")
    code, out, err = temper("run", tmp_path / "stf.yaml")
    assert (code, out) == (2, "")
    assert "does not exist" in err
    assert "did you mean" in err
    assert "Traceback" not in err


def test_a_misspelt_key_names_file_line_and_the_nearest_key(temper, tmp_path):
    path = tmp_path / "gate.yaml"
    path.write_text(RULE + "min_cuont: 3\n")
    code, _, err = temper("gate", path)
    assert code == 2
    assert "line 6" in err
    assert "did you mean 'min_count'?" in err


def test_an_unknown_stage_names_the_nearest(temper, tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text("stage: stf\n")
    code, _, err = temper("run", path)
    assert code == 2
    assert "did you mean 'sft'?" in err


def test_a_file_without_a_stage_says_so(temper, tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text("out: y\n")
    assert temper("run", path)[0] == 2


@pytest.mark.parametrize(("name", "hint"), [("serve", "temper serve"), ("gate", "temper gate")])
def test_run_points_to_the_command_that_a_file_is_for(name, hint, tmp_path):
    path = tmp_path / f"{name}.yaml"
    path.write_text("port: 1\n")
    with pytest.raises(ConfigError) as caught:
        run_file(path, [], dry_run=False)
    assert hint in caught.value.do


def test_a_programming_error_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(cli, "app", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cli.main([])


def test_an_interruption_is_130_and_says_how_to_go_on(monkeypatch, capsys):
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "app", interrupted)
    with pytest.raises(SystemExit) as stopped:
        cli.main([])
    assert stopped.value.code == 130
    assert "the same command goes on from the last checkpoint" in capsys.readouterr().err


def test_a_real_interrupt_signal_is_130():
    # a shell that runs in the background hands its children an ignored SIGINT, which Python would keep
    code = "import os, signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    code += "from temper import cli; import temper.cli.output as o\n"
    code += "import temper.cli.config as c; import typer\n"
    code += "@cli.app.command('hang')\ndef hang() -> None:\n    os.kill(os.getpid(), signal.SIGINT); import time; time.sleep(9)\n"
    code += "cli.main(['hang'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 130
    assert "goes on from the last checkpoint" in done.stderr
    assert "Traceback" not in done.stderr


def test_what_a_user_can_mend_is_explained():
    assert cli.explain(DataError("what", why="why", do="do")) == "what\n  why: why\n  do:  do"
    absent = ModuleNotFoundError("No module named 'bitsandbytes'", name="bitsandbytes.nn")
    assert "pip install" in (cli.explain(absent) or "")
    assert "'bitsandbytes'" in (cli.explain(absent) or "")
    assert "the disk is full" in (cli.explain(OSError(28, "No space left on device")) or "")
    assert "the disk is full" in (cli.explain(RuntimeError("write failed: No space left on device (os error 28)")) or "")
    assert cli.explain(ModuleNotFoundError("No module named 'temper.trian'", name="temper.trian")) is None
    assert cli.explain(ValueError("a bug")) is None


@pytest.mark.parametrize(("value", "decision", "expected"), [(0.8, "promote", 0), (0.2, "hold", 1), (None, "cannot_tell", 3)])
def test_gate_exits_by_its_verdict(temper, tmp_path, value, decision, expected):
    rule, found, out = tmp_path / "gate.yaml", tmp_path / "report.json", tmp_path / "verdict.json"
    rule.write_text(RULE)
    judged = report(value) if value is not None else report(0.8).model_copy(update={"dimensions": {}})
    write_json(found, judged)
    code, text, _ = temper("gate", rule, "--candidate", tmp_path, "--out", out, "--json")
    assert code == expected
    assert json.loads(text)["decision"] == decision == json.loads(out.read_text())["decision"]


def test_gate_takes_overrides(temper, tmp_path):
    rule = tmp_path / "gate.yaml"
    rule.write_text(RULE)
    write_json(tmp_path / "report.json", report(0.8))
    code, out, _ = temper("gate", rule, "min_count=50", "--candidate", tmp_path)
    assert code == 3
    assert "cannot tell" in out


def test_gate_of_a_missing_report_says_so(temper, tmp_path):
    rule = tmp_path / "gate.yaml"
    rule.write_text(RULE)
    code, _, err = temper("gate", rule, "--candidate", tmp_path / "nowhere.json")
    assert code == 2
    assert "nowhere.json does not exist" in err


def test_schema_is_json_schema_and_lists_its_names(temper):
    code, out, _ = temper("config", "schema", "gate")
    assert code == 0
    assert json.loads(out)["properties"]["min_count"]["minimum"] == 1
    code, out, _ = temper("config", "schema")
    assert code == 0
    for stage in ("sft", "preference", "reward", "rl", "distill", "evaluate", "gate", "serve", "data", "pipeline"):
        assert f" {stage} " in out
    assert temper("config", "schema", "stf")[0] == 2


def test_a_missing_room_breaks_only_its_own_command(temper, monkeypatch):
    from temper.cli import stages

    monkeypatch.setitem(stages.CONFIGS, "sft", "temper.no_such_room:Config")
    assert temper("config", "schema", "sft")[0] == 2
    assert temper("config", "schema", "gate")[0] == 0


def test_json_stays_clean_when_a_room_prints(temper, monkeypatch, tmp_path):
    module = tmp_path / "chatty_stage.py"
    module.write_text(
        "from temper.core.config import Config as Core\n"
        "class Config(Core):\n    stage: str = ''\n    out: str\n"
        "def run(cfg):\n    print('a word from the room'); return {'out': cfg.out, 'loss': None}\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    path = tmp_path / "x.yaml"
    path.write_text("stage: chatty.stage\nout: y\n")
    (tmp_path / "chatty").mkdir()
    module.rename(tmp_path / "chatty" / "stage.py")
    code, out, err = temper("run", path, "out=z", "--json")
    assert code == 0
    assert json.loads(out) == {"out": "z", "loss": None}
    assert "a word from the room" in err
    code, out, _ = temper("run", path)
    assert "–" in out  # None is shown as a dash, never as 0
    code, out, _ = temper("run", path, "--dry-run", "--json")
    assert json.loads(out) == {"config": {"stage": "chatty.stage", "out": "y"}}


def test_releases_of_a_folder_that_is_no_registry(temper, tmp_path):
    code, _, err = temper("releases", "list", "--registry", tmp_path)
    assert code == 2
    assert "is no registry" in err


def test_chat_without_a_server_says_how_to_start_one(temper):
    started = time.monotonic()
    code, _, err = temper("chat", "--url", "http://127.0.0.1:9/v1")
    assert code == 2
    assert "temper serve" in err
    assert time.monotonic() - started < 20


def test_serve_takes_keys_without_a_file(temper, tmp_path):
    code, _, err = temper("serve", f"registry={tmp_path}")
    assert code == 2
    assert "is no registry" in err


def test_python_dash_m_is_the_same_program():
    done = subprocess.run([sys.executable, "-m", "temper.cli", "data", "formats"], capture_output=True, text=True, cwd=ROOT, check=True)
    assert "sharegpt" in done.stdout


@pytest.mark.parametrize(
    ("success", "said"),
    [
        ({"value": 0.0, "count": 100, "low": 0.0, "high": 0.037}, "none of 100 tasks solved; 95% interval 0.0% to 3.7%"),
        ({"value": 0.25, "count": 8, "low": 0.07, "high": 0.59}, "2 of 8 tasks solved; 95% interval 7.0% to 59.0%"),
        ({"value": None, "count": 0, "low": None, "high": None}, "not measured"),
    ],
)
def test_an_evaluation_says_how_many_tasks_were_solved(success, said):
    assert said in judge.solved({"instruction.task_success": success})


def test_an_evaluation_reads_an_environment_from_where_it_is_told(temper, tmp_path):
    problem = {"question": "Two and one?", "answer": "2+1=3\n#### 3"}
    (tmp_path / "test.jsonl").write_text(json.dumps(problem) + "\n")
    config = "configs/gsm8k/evaluate.yaml"
    code, out, err = temper("run", ROOT / config, f"environment_options.folder={tmp_path}", "--dry-run", "--json")
    assert code == 0, err
    assert json.loads(out)["plan"]["tasks"] == 1
    code, _, err = temper("run", ROOT / config, f"environment_options.folder={tmp_path / 'nowhere'}", "--dry-run")
    assert code == 2
    assert "test.jsonl does not exist" in err
