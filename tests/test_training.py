"""Training keeps its word: the same seed gives the same weights, NaN stops a run, bad recipes are named."""
import signal
from dataclasses import replace
from functools import partial

import pytest
import torch
from lightning.pytorch.callbacks import Callback

from workbench.data import synthetic
from workbench.data.batches import Windows
from workbench.errors import RecipeError, TrainingError
from workbench.training import checkpoints
from workbench.training import fit as fitting
from workbench.training.checkpoints import load_checkpoint, newest_state, save_state
from workbench.training.fit import fit, set_up
from workbench.training.recipes import Recipe, sasrec

pytestmark = pytest.mark.usefixtures("one_thread")
QUICK = {"length": 20, "epochs": 6, "check_every": 2, "warmup": 5, "learning_rate": 5e-3, "batch_size": 32}


@pytest.fixture(scope="module")
def walks():
    return synthetic.walks(200, plays=25)


@pytest.mark.parametrize("loss", ["cross_entropy", "sampled_softmax", "gbce"])
def test_the_same_seed_gives_the_same_weights_and_another_seed_does_not(walks, loss):
    def weights(seed):
        model = fit(sasrec("tiny", seed=seed, loss=loss, **QUICK), walks, progress=False).model
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    first = weights(0)
    assert torch.equal(first, weights(0))
    assert not torch.equal(first, weights(1))


@pytest.mark.parametrize("change", [{"precision": "bfloat16"}, {"clip": 1.0}, {"steps": 1}, {"schedule": "constant"},
                                    {"packing": "on"}, {"loss": "gbce", "negatives": 20, "negatives_for": "position", "epochs": 120, "patience": 60},
                                    {"loss": "sampled_softmax", "negatives": 20, "negatives_for": "position"}])
def test_each_way_of_training_learns(walks, change):
    run = fit(sasrec("tiny", **QUICK | {"dropout": 0.0, "epochs": 12} | change), walks, progress=False)
    assert run.metrics["ndcg@10"] > 0.5      # chance is about 0.08


class Poison(Callback):
    "Makes one weight NaN after some epochs."

    def on_train_epoch_start(self, trainer, module):
        if trainer.current_epoch == 3:
            with torch.no_grad():
                module.model.norm.weight[0] = torch.nan


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_weights(walks, tmp_path, monkeypatch):
    make = fitting.make_trainer
    monkeypatch.setattr(fitting, "make_trainer",
                        lambda recipe, logger, calls, **more: make(recipe, logger, [Poison(), *calls], **more))
    with pytest.raises(TrainingError, match=r"the loss of optimiser step \d+ is nan"):
        fit(sasrec("tiny", **QUICK), walks, folder=tmp_path, progress=False, every=0)
    kept, (state, facts) = load_checkpoint(tmp_path/"best.ckpt"), newest_state(tmp_path/"checkpoints")
    assert kept["epoch"] == 2
    for weights in (kept["weights"], state["weights"]):
        assert all(torch.isfinite(each).all() for each in weights.values())
    assert facts["step"] % 3 == 0 and facts["step"] > 0
    monkeypatch.setattr(fitting, "make_trainer", make)
    assert fit(sasrec("tiny", **QUICK), walks, folder=tmp_path, progress=False).metrics["epochs"] == 6


def test_weights_that_are_not_finite_would_be_saved_without_the_check(tmp_path, monkeypatch):
    state = {"weights": {"w": torch.tensor([torch.nan])}, "step": 8}
    with pytest.raises(TrainingError, match="not finite"):
        save_state(tmp_path, state, {})
    monkeypatch.setattr(checkpoints, "all_finite", lambda weights: True)
    save_state(tmp_path, state, {})
    assert newest_state(tmp_path)[0]["weights"]["w"].isnan().all()


class Interrupting(Callback):
    "Stands for a person who presses Ctrl-C twice."

    def on_train_batch_end(self, trainer, module, outputs, batch, index):
        raise KeyboardInterrupt


def test_an_interrupt_comes_out_as_one_and_the_next_is_heard(walks):
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        fit(sasrec("tiny", **QUICK), walks, progress=False, callbacks=[Interrupting()])
    assert signal.getsignal(signal.SIGINT) is before
    assert fit(sasrec("tiny", **QUICK | {"epochs": 1}), walks, progress=False).metrics["epochs"] == 1


def test_a_run_stops_when_validation_no_longer_improves(walks):
    recipe = sasrec("tiny", **QUICK | {"learning_rate": 1e-8, "epochs": 50, "patience": 2})
    assert fit(recipe, walks, progress=False).metrics["epochs"] < 50


def test_a_time_budget_ends_a_run_with_a_usable_model(walks):
    run = fit(sasrec("tiny", **QUICK | {"minutes": 1e-6, "check_every": 5}), walks, progress=False)
    assert run.metrics["epochs"] == 1 and run.checkpoint.exists() and "ndcg@10" in run.metrics


@pytest.mark.parametrize(("field", "value"), [
    ("dropout", -0.1), ("width", 0), ("epochs", 2.5), ("learning_rate", float("inf")), ("precision", "fp4"),
    ("schedule", "step"), ("seed", -1), ("heads", 5), ("minutes", float("nan"))])
def test_a_bad_field_of_a_recipe_is_named(field, value):
    with pytest.raises(RecipeError, match=f"{field} is"):
        Recipe(**{field: value})


def test_an_unknown_loss_is_named_before_anything_is_trained(walks):
    with pytest.raises(Exception, match="there is no loss named 'crossentropy': did you mean 'cross_entropy'"):
        fit(sasrec("tiny", loss="crossentropy"), walks, progress=False)


def test_the_tenth_kind_of_network_in_a_process_is_compiled_too(walks, monkeypatch, tmp_path):
    compiled = partial(torch.compile, backend="eager")       # the limit is in what comes before the backend
    monkeypatch.setattr(torch, "compile", lambda function, **options: compiled(function, dynamic=False))
    def train(times):
        for number in range(times):
            training = set_up(sasrec("tiny", compile=True, width=8 + 8*number, **QUICK), walks, tmp_path)
            training.module.window_loss(next(iter(training.batches)).step(0))

    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        train(10)
        monkeypatch.setattr(torch.compiler, "reset", lambda: None)
        with pytest.raises(Exception, match="recompile_limit"):
            train(10)


@pytest.mark.gpu
@pytest.mark.parametrize("changes", [
    {}, {"precision": "bfloat16"}, {"compile": True}, {"loss": "sampled_softmax", "packing": "on"},
    {"model": "hstu", "compile": True, "precision": "bfloat16"}, {"model": "esasrec", "loss": "sampled_softmax", "compile": True}], ids=str)
def test_a_run_on_a_gpu_learns_what_a_run_on_a_cpu_learns(walks, changes):
    assert fit(sasrec("tiny", **QUICK | {"epochs": 12} | changes), walks, progress=False).metrics["ndcg@10"] > 0.5


@pytest.mark.gpu
@pytest.mark.parametrize("changes", [{}, {"compile": True}], ids=str)
def test_a_gpu_computes_the_loss_and_the_gradients_of_a_cpu(walks, changes, tmp_path):
    recipe, found = sasrec("tiny", **QUICK | {"dropout": 0.0}), []
    for device, changed in (("cpu", recipe), ("cuda", replace(recipe, **changes))):
        torch.manual_seed(0)
        training = set_up(changed, walks, tmp_path)
        module, batch = training.module.to(device), next(iter(training.batches)).step(0)
        loss = module.window_loss(Windows(*(None if each is None else each.to(device) for each in batch)))
        loss.backward()
        found.append([loss.detach().cpu(), *(each.grad.cpu() for each in module.model.parameters())])
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-5)


@pytest.mark.gpu
def test_a_run_on_a_gpu_that_is_killed_between_two_states_goes_on(walks, tmp_path):
    class Stop(Callback):
        def on_train_epoch_start(self, trainer, module):
            if module.done > 20:
                raise RuntimeError("stopped")

    recipe = sasrec("tiny", **QUICK | {"epochs": 8, "compile": True})
    with pytest.raises(RuntimeError, match="stopped"):
        fit(recipe, walks, tmp_path/"two", progress=False, every=0.0, callbacks=[Stop()])
    resumed, whole = fit(recipe, walks, tmp_path/"two", progress=False), fit(recipe, walks, tmp_path/"one", progress=False)
    assert [row["step"] for row in resumed.curve] == [row["step"] for row in whole.curve]
    assert abs(resumed.metrics["ndcg@10"] - whole.metrics["ndcg@10"]) < 0.1
