"""Train by one trainer; be killed at step 50, or go on from the checkpoint of step 37.

A process of its own for each run: `killed_program.py TRAINER FOLDER start|resume`.
"""

import os
import signal
import sys
from pathlib import Path

import torch
from common import BATCH, RULE, STEPS, Data, Net, batches, sgd

import gradclip as gc
from gradclip.torch import Clipper, attach

SAVED, KILLED = 37, 50
FOLDER, RESUMES = Path(sys.argv[2]), sys.argv[3] == "resume"
HISTORY = gc.History(FOLDER / "run.jsonl")


def note(done):
    """Be killed, as by a scheduler: nothing can be tidied up."""
    if done == SAVED:
        HISTORY.flush()
    if done == KILLED and not RESUMES:
        os.kill(os.getpid(), signal.SIGKILL)


def plain():
    model = Net()
    optimizer = sgd(model)
    clipper = attach(optimizer, RULE, model, history=HISTORY)
    parts = {"model": model, "optimizer": optimizer, "clipper": clipper}
    start = 0
    if RESUMES:
        saved = torch.load(FOLDER / "half.pt")
        for name, part in parts.items():
            part.load_state_dict(saved[name])
        start = SAVED
    for done, batch in enumerate(list(batches())[start:], start + 1):
        optimizer.zero_grad()
        model(**batch)["loss"].backward()
        optimizer.step()
        if done == SAVED:
            states = {name: part.state_dict() for name, part in parts.items()}
            torch.save(states, FOLDER / "half.pt")
        note(done)


def lightning():
    import lightning.pytorch as pl
    from test_lightning import fit, module_for

    from gradclip.integrations.lightning import GradientClipping

    class Note(pl.Callback):
        def on_train_batch_end(self, trainer, *_):
            note(trainer.global_step)

    saver = pl.callbacks.ModelCheckpoint(FOLDER, "half", every_n_train_steps=SAVED)
    callbacks = [GradientClipping(RULE, HISTORY), saver, Note()]
    options = {"enable_checkpointing": True}
    if RESUMES:
        # Lightning counts on from the batch it was at, and begins with the first one.
        options |= {"data": batches(start=SAVED), "ckpt_path": FOLDER / "half.ckpt"}
    fit(module_for(pl), callbacks, **options)


def hugging_face():
    from test_transformers import trainer_for
    from transformers import TrainerCallback

    from gradclip.integrations.transformers import GradientClippingCallback

    class Note(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            note(state.global_step)

    saving = {"save_strategy": "steps", "save_steps": SAVED}
    clipping = GradientClippingCallback(RULE, HISTORY)
    trainer = trainer_for(FOLDER / "out", clipping, **saving)
    trainer.add_callback(Note())
    checkpoint = str(FOLDER / "out" / f"checkpoint-{SAVED}")
    trainer.train(resume_from_checkpoint=checkpoint if RESUMES else None)


def accelerate():
    from accelerate import Accelerator

    from gradclip.integrations.accelerate import clip_

    accelerator = Accelerator(cpu=True)
    model = Net()
    model, optimizer, loader = accelerator.prepare(model, sgd(model), batches())
    clipper = Clipper(model, RULE, history=HISTORY)
    accelerator.register_for_checkpointing(clipper)
    start = 0
    if RESUMES:
        accelerator.load_state(str(FOLDER / "half"))
        start = int(clipper.state_dict()["step"])
    for done, batch in enumerate(list(loader)[start:], start + 1):
        accelerator.backward(model(**batch)["loss"])
        clip_(accelerator, clipper)
        optimizer.step()
        optimizer.zero_grad()
        if done == SAVED:
            accelerator.save_state(str(FOLDER / "half"))
        note(done)


def keras():
    import keras
    from test_keras import compiled

    start = SAVED if RESUMES else 0
    path = FOLDER / "half.keras"
    model = keras.saving.load_model(path) if RESUMES else compiled()
    HISTORY.begin(RULE)

    def after_batch(batch, logs):
        done, now = start + batch + 1, model.optimizer.metrics()
        norm, limit = now["grad_norm"], now["grad_limit"]
        after = min(norm, limit)
        HISTORY.record(
            done - 1, gc.Info(norm, limit, after / norm, True, after < norm, after)
        )
        if done == SAVED:
            model.save(path)
        note(done)

    data, rows = Data(), slice(start * BATCH, STEPS * BATCH)
    model.fit(
        data.x[rows].numpy(),
        data.y[rows].numpy(),
        batch_size=BATCH,
        shuffle=False,
        verbose=0,
        callbacks=[keras.callbacks.LambdaCallback(on_train_batch_end=after_batch)],
    )


TRAINERS = [plain, lightning, hugging_face, accelerate, keras]

if __name__ == "__main__":
    {trainer.__name__: trainer for trainer in TRAINERS}[sys.argv[1]]()
    HISTORY.close()
