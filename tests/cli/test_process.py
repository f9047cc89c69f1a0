"""The command as a process: entry points, what is loaded, terminals, pipes, interruptions."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys

import pytest

import simllm
from simllm.cli import main, output

PLAN = "plan llama-3-8b --cluster dgx-h100 --gpus 8 --global-batch-size 8"


def process(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, check=False, env=os.environ | environment
    )


def test_module_is_the_command() -> None:
    done = process("-m", "simllm", "models", "show", "gpt2", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["parameters"]["total"] == 124439808
    done = process("-m", "simllm", "models", "show", "gtp2")
    assert (done.returncode, done.stdout) == (2, "")
    assert "did you mean gpt2" in done.stderr


def loaded(code: str) -> set[str]:
    done = process("-c", f"import sys; {code}; print('\\n'.join(sys.modules), file=sys.stderr)")
    assert done.returncode == 0, done.stderr
    return {name.partition(".")[0] for name in done.stderr.split()}


def test_nothing_heavy_is_loaded_until_needed() -> None:
    heavy = {"torch", "pandas", "networkx", "matplotlib", "scipy", "numpy", "yaml"}

    def run(line: str) -> set[str]:
        return loaded(f"from simllm.cli import main; main({line.split()!r})")

    assert not loaded("import simllm.cli") & (heavy | {"typer", "rich"})
    assert not run("--help") & (heavy | {"rich"})
    assert not run("models show llama-3-70b") & heavy
    assert not run("collective all_reduce --size 1GB --cluster dgx-h100 --gpus 8") & (heavy - {"yaml"})


@pytest.mark.parametrize("words", [["--help"], ["-h"], []])
def test_help(capsys: pytest.CaptureFixture[str], words: list[str]) -> None:
    assert main(words) == 0
    text = capsys.readouterr().out
    for command in ("models", "hardware", "collective", "estimate", "plan", "validate", "calibrate"):
        assert f"\n  {command} " in text


@pytest.mark.parametrize(
    "command",
    [
        "models list",
        "models show",
        "models compare",
        "hardware list",
        "hardware show",
        "hardware check",
        "collective",
        "estimate",
        "plan",
        "export",
        "sweep",
        "validate runs",
        "validate collectives",
        "calibrate collectives",
    ],
)
def test_help_of_a_command_has_an_example_and_json(capsys: pytest.CaptureFixture[str], command: str) -> None:
    assert main([*command.split(), "--help"]) == 0
    text = capsys.readouterr().out
    assert f"\n    simllm {command} " in text
    assert "--json" in text
    assert max(map(len, text.splitlines())) <= 100


def examples() -> list[str]:
    from simllm.cli import collective, estimate, hardware, models, plan

    functions = [collective.collective, estimate.estimate, plan.plan, models.show, models.compare, models.list_models]
    functions += [hardware.list_hardware, hardware.show]
    docs = "\n".join(function.__doc__ or "" for function in functions).replace("\\\n", " ")
    return [" ".join(line.split()[1:]) for line in docs.splitlines() if line.strip().startswith("simllm ")]


#: Files that examples read.
FILES = {
    "megatron-args.txt": "--num-layers 32 --hidden-size 4096 --num-attention-heads 32 --vocab-size 32000 --swiglu "
    "--position-embedding-type rope --seq-length 2048 --micro-batch-size 1 --global-batch-size 512 --bf16",
    "ds_config.json": '{"train_batch_size": 64, "zero_optimization": {"stage": 3}, "bf16": {"enabled": true}}',
}


@pytest.mark.parametrize("line", examples())
def test_examples_of_the_help_work(capsys: pytest.CaptureFixture[str], line: str, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, content in FILES.items():
        (tmp_path / name).write_text(content)
    assert main(line.split()) == 0
    assert capsys.readouterr().out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"simllm {simllm.__version__}\n"


def test_interruption(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("simllm.planner.plan", interrupted)
    assert main(PLAN.split()) == 130
    assert "Traceback" not in capsys.readouterr().err


def test_a_defect_is_not_taken_for_an_answer(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("simllm.planner.plan", broken)
    assert main(PLAN.split()) == 70
    out, err = capsys.readouterr()
    assert out == ""
    assert "ZeroDivisionError" in err
    assert "report it" in err


@pytest.mark.parametrize("words", ["hardware list --json", "estimate --help"])
def test_reader_that_leaves_early(words: str) -> None:
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "simllm", *words.split()], stdout=write, stderr=subprocess.PIPE, check=False
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (141, b"")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_full_disk_behind_standard_output() -> None:
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [sys.executable, "-m", "simllm", "models", "list"], stdout=full, stderr=subprocess.PIPE, check=False
        )
    assert done.returncode == 2
    assert done.stderr == b"simllm: cannot write to standard output: No space left on device\n"


def test_narrow_encoding() -> None:
    done = process("-m", "simllm", "models", "show", "gpt2", PYTHONIOENCODING="ascii")
    assert done.returncode == 0
    assert "-----" in done.stdout
    assert "?" not in done.stdout


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_progress_and_styles(monkeypatch: pytest.MonkeyPatch) -> None:
    out, err = Terminal(), Terminal()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("COLUMNS", "70")
    assert main(PLAN.split()) == 0
    assert "\x1b[1m" in out.getvalue()
    assert "plans priced" in err.getvalue()
    assert err.getvalue().endswith("\r\x1b[K")  # and takes it away again
    out.seek(0)
    out.truncate()
    monkeypatch.setenv("NO_COLOR", "1")
    assert main(["models", "show", "gpt2"]) == 0
    assert "\x1b" not in out.getvalue()
    assert max(map(len, out.getvalue().splitlines())) <= 70


def test_no_progress_without_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with output.progress("things") as tick:
        assert tick is None
