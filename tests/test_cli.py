"""The program from outside: what it prints, the files it leaves, how it ends."""

import json
import os
import signal
import subprocess
import sys

import pytest
import typer
from typer.testing import CliRunner

import gradclip
from gradclip import cli, watching

ARMS = ("unclipped", "norm-1", "norm-0.25", "percentile", "zscore")
LISTENING = """
import signal
from gradclip.cli import main
signal.signal(signal.SIGINT, signal.default_int_handler)
main()
"""
PATIENCE = 120
PROGRAM = (sys.executable, "-m", "gradclip")
WITHOUT = "import sys; sys.modules[{!r}] = None; from gradclip.cli import main; main()"


def start(*options):
    """Start the program so that Ctrl-C reaches it from background jobs too."""
    return subprocess.Popen(
        [sys.executable, "-c", LISTENING, *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def interrupted(process):
    """Return what the program prints after Ctrl-C; one that goes on is killed."""
    process.send_signal(signal.SIGINT)
    try:
        return process.communicate(timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()
        raise


def run(*arguments, program=PROGRAM):
    return subprocess.run([*program, *arguments], capture_output=True, text=True)


def entries(folder):
    texts = {name: (folder / f"{name}.jsonl").read_text("utf-8") for name in ARMS}
    return {name: list(map(json.loads, x.splitlines())) for name, x in texts.items()}


def test_demo_prints_lines_and_a_table_and_leaves_files(tmp_path):
    result = run("demo", "--steps", "10", "--out", str(tmp_path / "new" / "folder"))
    assert result.returncode == 0, result.stderr
    assert "\x1b" not in result.stdout
    assert "ZScore(max_limit=1.0)    step 10/10  loss" in result.stdout
    assert "Norm(inf), no clip" in result.stdout
    assert "After 10 of 10 steps" in result.stdout
    folder = tmp_path / "new" / "folder"
    assert {len(lines) for lines in entries(folder).values()} == {11}
    assert (folder / "demo.png").stat().st_size > 10_000
    assert set(json.loads((folder / "summary.json").read_text())["arms"]) == set(ARMS)


def test_demo_prints_json_and_nothing_else(tmp_path):
    options = ("--steps", "4", "--seed", "7", "--out", str(tmp_path))
    result = run("demo", "--json", *options)
    assert result.returncode == 0, result.stderr
    summary = json.loads(result.stdout)
    assert summary == json.loads((tmp_path / "summary.json").read_text())
    assert summary["run"]["seed"] == 7
    assert {arm["steps"] for arm in summary["arms"].values()} == {4}


def test_ctrl_c_keeps_what_is_done(tmp_path):
    options = ("--steps", "100000", "--out", str(tmp_path))
    with start("demo", *options) as process:
        while not all(written(tmp_path / f"{name}.jsonl", 3) for name in ARMS):
            assert process.poll() is None, process.stderr.read()
        printed, complaints = interrupted(process)
    assert process.returncode == 130
    assert complaints == ""
    assert "of 100000 steps at learning rate 10" in printed
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["interrupted"] is True
    for name, lines in entries(tmp_path).items():
        assert [line["step"] for line in lines[1:]] == list(range(len(lines) - 1))
        assert summary["arms"][name]["steps"] == len(lines) - 1
    assert (tmp_path / "demo.png").stat().st_size > 10_000


def written(path, lines):
    return path.exists() and path.read_bytes().count(b"\n") >= lines


def test_ctrl_c_before_the_first_step_ends_quietly(tmp_path):
    options = ("--out", str(tmp_path / "out"))
    with start("demo", *options) as process:
        while not (tmp_path / "out").exists():
            assert process.poll() is None, process.stderr.read()
        _, complaints = interrupted(process)
    assert process.returncode == 130
    assert "Traceback" not in complaints


@pytest.mark.parametrize("steps", ["0", "-5", "many"])
def test_demo_refuses_a_number_of_steps_below_one(steps):
    result = run("demo", "--steps", steps)
    assert result.returncode == 2
    assert "Invalid value for '--steps'" in result.stderr


def test_demo_refuses_a_file_as_its_folder(tmp_path):
    (tmp_path / "taken").write_text("kept")
    for path in (tmp_path / "taken", tmp_path / "taken" / "below"):
        result = run("demo", "--out", str(path))
        assert result.returncode == 2
        assert "Invalid value for '--out'" in result.stderr
        assert "Traceback" not in result.stderr
    assert (tmp_path / "taken").read_text() == "kept"


def test_a_folder_that_cannot_be_made_is_no_traceback(tmp_path):
    with pytest.raises(typer.BadParameter, match="name too long"):
        cli._folder(cli._possible(tmp_path / ("x" * 300)))


@pytest.mark.parametrize("module", ["torch", "matplotlib"])
def test_demo_says_how_to_install_what_is_missing(module):
    result = run("demo", program=(sys.executable, "-c", WITHOUT.format(module)))
    assert result.returncode == 1
    assert result.stderr == (
        f"gradclip demo needs {module}, which is not installed: "
        'pip install "gradclip[demo]"\n'
    )


def test_the_program_says_how_to_install_its_command_line():
    result = run("demo", program=(sys.executable, "-c", WITHOUT.format("typer")))
    assert result.returncode == 1
    assert 'pip install "gradclip[report]"' in result.stderr
    assert "Traceback" not in result.stderr


def test_a_terminal_for_ascii_shows_what_it_can(tmp_path):
    log = tmp_path / "out.log"
    log.write_text("\n".join(f"step {i} grad_norm {i + 1}.5" for i in range(30)))
    shown = subprocess.run(
        [*PROGRAM, "watch", "--once", log],
        capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
    )
    assert shown.returncode == 0, shown.stderr
    assert b"step 29" in shown.stdout


def rewritten(path, text):
    path.write_text(text)
    # As an hour later, since two writes may come within one tick of the clock.
    os.utime(path, ns=(10**18, path.stat().st_mtime_ns + 3600 * 10**9))


def exchanged(path, text):
    """Put another file in the place of one, of the same time."""
    other, stat = path.with_name("other"), path.stat()
    other.write_text(text)
    os.utime(other, ns=(10**18, stat.st_mtime_ns))
    other.replace(path)


@pytest.mark.parametrize(
    ("change", "folder"),
    [(rewritten, False), (exchanged, False), (rewritten, True), (exchanged, True)],
)
def test_watch_shows_a_log_that_became_another_as_long(
    tmp_path, monkeypatch, change, folder
):
    log, shown, old = tmp_path / "run.jsonl", [], 10**18
    log.write_text("one")
    for path in (log, tmp_path):
        os.utime(path, ns=(old, old))
    looks = iter([lambda: None, lambda: change(log, "two"), lambda: None])

    def sleep(seconds):
        look = next(looks, None)
        if look is None:
            raise KeyboardInterrupt
        look()

    def now(path, width):
        shown.append(log.read_text())
        return ""

    monkeypatch.setattr(watching.time, "sleep", sleep)
    monkeypatch.setattr(watching, "_now", now)
    watched = str(tmp_path if folder else log)
    result = CliRunner().invoke(cli.app, ["watch", watched])
    assert shown == ["one", "two"]
    # Ctrl-C is how it ends.
    assert result.exit_code == 0


def test_watch_refuses_what_it_cannot_follow(tmp_path):
    text = "".join(f"step {i} grad_norm {i + 1}.5\n" for i in range(30))
    os.mkfifo(tmp_path / "pipe")
    for path in ("-", tmp_path / "pipe"):
        refused = subprocess.run(
            [*PROGRAM, "watch", path],
            input=text,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
        )
        assert refused.returncode == 2
        told = " ".join(refused.stderr.replace("│", "").split())
        assert "cannot be followed. Write it to a file" in told
    once = subprocess.run(
        [*PROGRAM, "watch", "--once", "-"], input=text, capture_output=True, text=True
    )
    assert once.returncode == 0, once.stderr
    assert "step 29" in once.stdout


def test_version_and_help_need_no_torch():
    for option, answer in (
        ("--version", f"gradclip {gradclip.__version__}\n"),
        ("--help", "Train one network without clipping and under four rules"),
    ):
        result = run(option, program=(sys.executable, "-c", WITHOUT.format("torch")))
        assert result.returncode == 0, result.stderr
        assert answer in result.stdout
