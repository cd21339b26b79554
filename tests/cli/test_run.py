"""``mlx-lm-skiphead run`` against ``python``: the same arguments, output, exit code and signals."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import ranks
import tiny_checkpoint
import warm

RUN = [sys.executable, "-m", "mlx_lm_skiphead", "run"]

PROGRAM = """
import sys
import mlx_lm_skiphead
print(__name__, sys.argv, sys.path[0])
print("mode", mlx_lm_skiphead.status().mode)
sys.exit(int(sys.argv[1]))
"""


def run(*arguments: str, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "MLX_LM_SKIPHEAD"} | variables
    environment["PYTHONPATH"] = str(Path(__file__).parents[2])
    return subprocess.run(
        arguments, cwd=cwd, env=environment, capture_output=True, text=True, timeout=60
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "program.py").write_text(PROGRAM)
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__main__.py").write_text(PROGRAM)
    return tmp_path


@pytest.mark.parametrize("code", ["0", "3"])
@pytest.mark.parametrize("module", ["program", "package"])
def test_a_module(module: str, code: str, folder: Path) -> None:
    arguments = [code, "--model", "a b", "--", "-n", "2"]
    plain = run(sys.executable, "-m", module, *arguments, cwd=folder)
    ours = run(*RUN, module, *arguments, cwd=folder)
    assert plain.returncode == ours.returncode == int(code)
    assert ours.stdout == plain.stdout.replace("mode off", "mode on")
    assert not ours.stderr


def test_a_script(folder: Path) -> None:
    plain = run(sys.executable, "program.py", "4", "-v", cwd=folder)
    ours = run(*RUN, "program.py", "4", "-v", cwd=folder)
    assert plain.returncode == ours.returncode == 4
    assert ours.stdout == plain.stdout.replace("mode off", "mode on")


@pytest.mark.parametrize(("value", "mode"), [("hidden", "hidden"), ("yes", "on"), ("0", "off")])
def test_the_variable_is_heeded(value: str, mode: str, folder: Path) -> None:
    done = run(*RUN, "program", "0", cwd=folder, MLX_LM_SKIPHEAD=value)
    assert f"mode {mode}\n" in done.stdout
    assert ("stays off" in done.stderr) == (mode == "off")


@pytest.mark.parametrize("variable", ["", "_WATCH", "_DOWNLOAD"])
def test_a_value_that_is_not_understood(variable: str, folder: Path) -> None:
    """It is a line of the command line, and an error of the import in a program."""
    variables = {"MLX_LM_SKIPHEAD": "1", f"MLX_LM_SKIPHEAD{variable}": "bad"}
    said = f"MLX_LM_SKIPHEAD{variable}='bad' is not understood."
    for python in ([sys.executable], [sys.executable, "-X", "utf8"]):
        done = run(*python, *RUN[1:], "program", "0", cwd=folder, **variables)
        assert done.returncode == 2 and not done.stdout
        assert done.stderr.startswith(f"mlx-lm-skiphead: {said}")
        assert done.stderr.count("\n") == 1
    done = run(sys.executable, "program.py", "-m", "mlx_lm_skiphead", cwd=folder, **variables)
    assert done.returncode == 1 and f"ValueError: {said}" in done.stderr


@pytest.mark.parametrize("name", ["no_such_module", "no.such.module", "no_such_file.py"])
def test_what_is_not_there(name: str, folder: Path) -> None:
    done = run(*RUN, name, cwd=folder)
    assert done.returncode == 2
    assert f"there is no {'file' if name.endswith('.py') else 'module'} {name}" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("name", ["chat", "benchmark", "generate", "server"])
def test_mlx_lm_itself(name: str, folder: Path) -> None:
    plain = run(warm.python(), "-m", f"mlx_lm.{name}", "--help", cwd=folder)
    ours = run(warm.python(), *RUN[1:], f"mlx_lm.{name}", "--help", cwd=folder)
    assert ours.returncode == plain.returncode == 0
    assert ours.stdout == plain.stdout


def test_mlx_lm_generate(folder: Path) -> None:
    (folder / "model").mkdir()
    tiny_checkpoint.write("deepseek_v3", folder / "model")
    command = ["mlx_lm.generate", "--model", str(folder / "model"), "--prompt", "Hello"]
    command += ["--max-tokens", "5"]
    plain = run(warm.python(), "-m", *command, cwd=folder)
    ours = run(warm.python(), *RUN[1:], *command, cwd=folder)
    assert ours.returncode == plain.returncode == 0

    def text(output: str) -> str:
        return output.split("==========")[1]

    assert len(text(plain.stdout)) > 5
    assert text(ours.stdout) == text(plain.stdout)


# It does not import the plugin: autowrapt does.
NOT_CHANGED = """
import sys
import mlx.core as mx, mlx_lm.generate, ranks, tiny_models
model = tiny_models.make("deepseek_v3")
group = ranks.join()
if group.size() > 1:
    model.model.pipeline(group)
steps = sys.modules["mlx_lm.generate"].generate_step(mx.array([3, 1, 4]), model, max_tokens=6)
tokens, logprobs = zip(*((token, logprobs[token].item()) for token, logprobs in steps))
ranks.report([tokens, logprobs[0] != logprobs[0]])
"""


@pytest.mark.parametrize("value", ["0", "1"])
def test_autowrapt(value: str, tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(NOT_CHANGED)
    variables = {"AUTOWRAPT_BOOTSTRAP": "mlx_lm_skiphead", "MLX_LM_SKIPHEAD": value}
    (tokens, _), *_ = ranks.alone(tmp_path / "program.py").results
    told = ranks.launch(tmp_path / "program.py", ranks=2, env=variables).results
    # A worker's logprobs are NaN where its head is skipped.
    assert told == [[tokens, False], [tokens, value == "1"]]


def test_sigterm(folder: Path) -> None:
    (folder / "waits.py").write_text("print('here', flush=True)\nimport time\ntime.sleep(60)\n")
    process = subprocess.Popen([*RUN, "waits"], cwd=folder, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "here\n"
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == -signal.SIGTERM


# What a program with an inference worker does: the model is in another process, and the program
# imports no plugin.
WORKER = """
import multiprocessing
import subprocess
import sys

def work():
    import importlib
    import mlx.core as mx
    import ranks
    import tiny_models
    from mlx_lm_skiphead.cli.measure import count_heads
    group = ranks.join()
    model = tiny_models.make("deepseek_v3")
    model.model.pipeline(group)
    loops = importlib.import_module("mlx_lm.generate")
    with count_heads(model) as count:
        steps = loops.generate_step(mx.array([3, 1, 4]), model, max_tokens=6)
        tokens = [token for token, _ in steps]
        mx.synchronize(loops.generation_stream)
    mx.eval(mx.distributed.all_sum(mx.array(1.0), stream=mx.cpu))  # no rank ends before another
    ranks.report([tokens, count()])

if __name__ == "__main__":
    if sys.argv[1:] == ["work"]:
        work()
    elif sys.argv[1] == "subprocess":
        subprocess.run([sys.executable, __file__, "work"], check=True)
    else:
        process = multiprocessing.get_context(sys.argv[1]).Process(target=work)
        process.start()
        process.join()
        sys.exit(process.exitcode)
"""
RUNS = """
import sys
from mlx_lm_skiphead.cli import main
sys.exit(main(["run", *sys.argv[1:]]))
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    program = tmp_path_factory.mktemp("worker") / "program.py"
    program.write_text(WORKER)
    return program


@pytest.fixture(scope="module")
def without_run(program: Path) -> Any:
    return ranks.launch(program, "subprocess", ranks=2).results


@pytest.mark.parametrize("how", ["spawn", "forkserver", "fork", "subprocess"])
def test_a_worker_in_another_process(
    how: str, program: Path, without_run: Any, tmp_path: Path
) -> None:
    runs = tmp_path / "runs.py"
    runs.write_text(RUNS)
    cold = {"PYTHONUNBUFFERED": "1"}  # a warm Python begins without sitecustomize
    told = ranks.launch(runs, str(program), how, ranks=2, env=cold).results
    (tokens, heads), *_ = without_run
    assert heads == 7  # mlx-lm computes one token more than it gives out
    assert without_run == [[tokens, heads]] * 2
    assert told == [[tokens, heads], [tokens, 0]]


PRINTS_MODE = "import sys; m = sys.modules.get('mlx_lm_skiphead'); print(m and m.status().mode)"
CHILD = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {PRINTS_MODE!r}])"


def test_children_are_switched_on_by_run_only(folder: Path) -> None:
    (folder / "child.py").write_text(CHILD)
    hidden = folder / "hidden"
    hidden.mkdir()
    (hidden / "sitecustomize.py").write_text("print('hidden', __file__)\n")
    path = os.pathsep.join([str(hidden), str(Path(__file__).parents[2])])
    said = f"hidden {hidden / 'sitecustomize.py'}\n"

    def output(*command: str, **variables: str) -> str:
        environment = {k: v for k, v in os.environ.items() if k != "MLX_LM_SKIPHEAD"} | variables
        environment["PYTHONPATH"] = path
        return subprocess.run(
            [sys.executable, *command],
            cwd=folder,
            env=environment,
            check=True,
            capture_output=True,
            text=True,
            timeout=60,
        ).stdout

    # Once in the program, once in its child.
    assert output("child.py") == f"{said}{said}None\n"
    assert output(*RUN[1:], "child.py") == f"{said}{said}on\n"
    assert output(*RUN[1:], "child.py", MLX_LM_SKIPHEAD="hidden") == f"{said}{said}hidden\n"
    assert output(*RUN[1:], "child.py", MLX_LM_SKIPHEAD="0") == f"{said}{said}None\n"
    # A `run` in a `run` does not run it twice.
    assert output(*RUN[1:], "-m", "mlx_lm_skiphead", "run", "child.py") == f"{said}{said}on\n"


def test_a_module_by_its_option_and_a_script_without_a_suffix(folder: Path) -> None:
    (folder / "tool").write_text(PROGRAM)
    plain = run(sys.executable, "-m", "package", "0", "-m", cwd=folder)
    ours = run(*RUN, "-m", "package", "0", "-m", cwd=folder)
    assert ours.stdout == plain.stdout.replace("mode off", "mode on") and not ours.stderr
    plain = run(sys.executable, "./tool", "5", cwd=folder)
    ours = run(*RUN, "./tool", "5", cwd=folder)
    assert plain.returncode == ours.returncode == 5
    assert ours.stdout == plain.stdout.replace("mode off", "mode on")


# As a server does: ranks that do not agree are found in a thread, which catches the error.
IN_A_THREAD = """
import logging
import threading
import time
def work():
    logging.getLogger("mlx_lm_skiphead").{level}("differs")
threading.Thread(target=work).start()
time.sleep(60 if "{level}" == "critical" else 0)
"""


@pytest.mark.parametrize(("level", "code"), [("critical", -signal.SIGTERM), ("error", 0)])
def test_ranks_that_do_not_agree_end_though_a_thread_finds_it(
    level: str, code: int, folder: Path
) -> None:
    (folder / "threads.py").write_text(IN_A_THREAD.format(level=level))
    done = run(*RUN, "threads.py", cwd=folder)
    assert done.returncode == code
    assert done.stderr == "differs\n"
