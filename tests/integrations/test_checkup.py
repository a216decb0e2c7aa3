"""`gradclip doctor` on scripts that train with a trainer."""

from pathlib import Path

import pytest
from accelerate.state import AcceleratorState, GradientState, PartialState

from gradclip.checkup import Program, examine, findings, lines_of

SCRIPTS = Path(__file__).with_name("scripts")
PROPER = sorted(path.stem for path in (SCRIPTS / "right").glob("*.py"))
WRONG = {
    "lightning_training_step": "used",
    "hf_late_callback": "used",
    "accelerate_each_micro_batch": "added",
}


@pytest.fixture(autouse=True)
def fresh():
    yield
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


@pytest.mark.parametrize("name", PROPER)
def test_proper_use_is_silent(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ledger, ended = examine(Program(str(SCRIPTS / "right" / f"{name}.py")), [], 8)
    assert ended.how == "was ended after step 8"
    assert findings(ledger) == []
    # Hugging Face also measures a norm where it does not clip.
    (line,) = [x for x in lines_of(ledger) if not x.clips[0].measures]
    assert len(line.clips) == ledger.steppers[0].clipped_for == 8
    assert f"{name}.py:" in line.site


@pytest.mark.parametrize("name", WRONG)
def test_misuse_is_told(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ledger, _ = examine(Program(str(SCRIPTS / "wrong" / f"{name}.py")), [], 8)
    (told,) = findings(ledger)
    assert told["kind"] == WRONG[name]
    assert f"{name}.py:" in told["line"]
