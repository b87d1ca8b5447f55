import re
import warnings

import pytest
import torch
from guarded_training import STEP_KINDS, Frozen, GuardedModule
from tiny_training import trainer
from torch import nn

from lightning_n2uq.callbacks import NonFiniteError, NonFiniteGuard, non_finite_guard


def fit(tmp_path, module, guard, **options):
    frozen = Frozen()
    runner = trainer(tmp_path, [guard, frozen], max_epochs=1, **options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        runner.fit(module, ckpt_path=options.get("ckpt_path"))
    return frozen, [str(w.message) for w in caught if "NonFiniteGuard" in str(w.message)]


def quiet(action="off", **actions):
    kinds = dict.fromkeys((*STEP_KINDS, "parameter", "floor", "weight"), "off")
    return NonFiniteGuard(**{**kinds, **actions})


def test_healthy_training_is_not_touched(tmp_path):
    plain, guarded = GuardedModule(), GuardedModule()
    trainer(tmp_path, max_epochs=1).fit(plain)
    guard = NonFiniteGuard(*["stop"] * 7)
    _, messages = fit(tmp_path, guarded, guard)
    assert not messages
    assert not guard.counts
    for one, two in zip(plain.state_dict().values(), guarded.state_dict().values(), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("kind", STEP_KINDS)
def test_stop_names_step_and_kind_before_the_step(tmp_path, kind):
    module = GuardedModule({(0, 2): kind})
    with pytest.raises(NonFiniteError, match=rf"step 2: .*{kind}: stop") as error:
        fit(tmp_path, module, quiet(**{kind: "stop"}))
    if kind == "gradient":
        assert "net.2.weight" in str(error.value)
    assert all(torch.isfinite(p).all() for p in module.parameters())


class Overflowing(GuardedModule):
    """A network that takes one tensor; a layer in its middle overflows at batch 2, and drops values out."""

    def __init__(self, where="net.1"):
        super().__init__()
        self.where, self.norm2, self.dropout = where, nn.BatchNorm1d(16), nn.Dropout(0.1)
        self.net[1].register_forward_hook(self.overflow("net.1"))

    def overflow(self, name):
        def hook(module, args, output):
            broken = self.where == name and self.trainer.fit_loop.batch_idx == 2
            return output * torch.tensor(1e38) * 1e38 if broken else None

        return hook

    def forward(self, x):
        first, activation, last = self.net
        return last(self.dropout(self.norm2(activation(first(self.norm(x))))))

    def training_step(self, batch, batch_idx):
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
        return loss * float("inf") if self.where == "loss" and batch_idx == 2 else loss


@pytest.mark.parametrize(
    ("where", "words"),
    [("net.1", "first in the output of net.1 "), ("loss", "the outputs of all layers are finite ")],
)
def test_a_broken_loss_names_the_layer_where_it_began(tmp_path, where, words):
    with pytest.raises(NonFiniteError, match=r"step 2: the loss is NaN or inf") as error:
        fit(tmp_path, Overflowing(where), NonFiniteGuard())
    assert words in str(error.value)


def test_looking_for_the_layer_changes_no_random_number_and_no_statistic(tmp_path, monkeypatch):
    def run(folder):
        torch.manual_seed(5)
        module = Overflowing()
        frozen, messages = fit(folder, module, quiet(loss="skip"))
        return frozen.after[-1], torch.get_rng_state(), messages

    state, random, messages = run(tmp_path / "looked")
    assert any("first in the output of net.1" in message for message in messages)
    monkeypatch.setattr(non_finite_guard, "first_broken_output", lambda *_: None)
    plain, plain_random, _ = run(tmp_path / "not")
    assert torch.equal(random, plain_random)
    for name, value in plain.items():
        assert torch.equal(value, state[name]), name


def test_the_gradient_nearest_to_the_loss_is_named_first(tmp_path):
    class Broken(GuardedModule):
        def on_after_backward(self):
            for parameter in self.parameters():
                parameter.grad.fill_(float("nan"))

    with pytest.raises(NonFiniteError, match=r"gradient: net\.2\.") as error:
        fit(tmp_path, Broken(), NonFiniteGuard())
    assert " more (" in str(error.value)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("kind", STEP_KINDS)
def test_skip_leaves_parameters_momentum_and_statistics(tmp_path, kind, optimizer):
    guard = quiet(**{kind: "skip"})
    frozen, messages = fit(tmp_path, GuardedModule({(0, 2): kind}, optimizer), guard)
    assert frozen.before[2].keys() == frozen.after[2].keys()
    for name, value in frozen.before[2].items():
        assert torch.equal(value, frozen.after[2][name]), name
    assert not torch.equal(frozen.before[3]["net.0.weight"], frozen.after[3]["net.0.weight"])
    assert all(torch.isfinite(value).all() for value in frozen.after[-1].values())
    assert guard.counts == {kind: 1, "skipped_steps": 1}
    assert any("step 2" in message for message in messages)


def test_skip_drops_all_accumulated_batches(tmp_path):
    frozen, _ = fit(
        tmp_path, GuardedModule({(0, 2): "input"}), quiet(input="skip"), accumulate_grad_batches=2
    )
    for name, value in frozen.before[2].items():  # batches 2 and 3 are one step
        assert torch.equal(value, frozen.after[3][name]), name
    assert all(torch.isfinite(value).all() for value in frozen.after[-1].values())


def test_warn_says_it_once_and_counts(tmp_path):
    guard = quiet(constant_batch="warn")
    breaks = {(0, 1): "constant_batch", (0, 3): "constant_batch"}
    _, messages = fit(tmp_path, GuardedModule(breaks), guard)
    assert guard.counts == {"constant_batch": 2}
    assert [m for m in messages if "step 1" in m]
    assert not [m for m in messages if "step 3" in m]
    assert "constant_batch 2" in messages[-1]


def test_a_large_gradient_whose_square_overflows_is_no_case(tmp_path):
    guard = quiet(gradient="stop")
    fit(tmp_path, GuardedModule({(0, 5): "large"}), guard)
    assert not guard.counts


def test_too_many_skips_in_a_row_stop(tmp_path):
    breaks = {(0, index): "loss" for index in range(1, 6)}
    with pytest.raises(NonFiniteError, match="3 steps in a row"):
        fit(tmp_path, GuardedModule(breaks), NonFiniteGuard(loss="skip", gradient="off", max_skips=2))


@torch.no_grad()
def broken_module(what):
    module = GuardedModule()
    if what == "parameter":
        module.net[0].activation_quantizer.widths[1] = float("nan")
    elif what == "floor":
        module.net[0].activation_quantizer.widths[1] = 1e-4
    elif what == "zero":
        module.net[2].weight.zero_()
    else:
        module.net[2].weight.fill_(0.5)
    return module


@pytest.mark.parametrize(
    ("what", "kind", "place"),
    [
        ("parameter", "parameter", "net.0.activation_quantizer.widths"),
        ("floor", "floor", r"net.0.activation_quantizer.widths \(1 of 3\)"),
        ("zero", "weight", r"net.2.weight \(all zero\)"),
        ("equal", "weight", r"net.2.weight \(all equal\)"),
    ],
)
def test_state_is_judged_and_named(tmp_path, what, kind, place):
    with pytest.raises(NonFiniteError, match=f"step 0: .*{place}"):
        fit(tmp_path, broken_module(what), quiet(**{kind: "stop"}))
    guard = quiet(**{kind: "warn"})
    _, messages = fit(tmp_path, broken_module(what), guard)
    assert guard.counts[kind] > 0
    assert re.search(f"step 0: .*{place}", messages[0])


def test_a_step_that_breaks_the_weights_last_is_found(tmp_path):
    class Breaking(GuardedModule):
        def on_train_batch_end(self, outputs, batch, batch_idx):
            if batch_idx == 5:
                with torch.no_grad():
                    self.norm.running_var.fill_(float("nan"))

    with pytest.raises(NonFiniteError, match=r"step 6: .*norm.running_var"):
        fit(tmp_path, Breaking(), NonFiniteGuard())


def test_state_survives_resume(tmp_path):
    guard = quiet(constant_batch="warn")
    runner = trainer(tmp_path, [guard], max_epochs=1)
    with pytest.warns(UserWarning, match="constant"):
        runner.fit(GuardedModule({(0, 1): "constant_batch"}))
    runner.save_checkpoint(tmp_path / "a.ckpt")
    again = quiet(constant_batch="warn")
    runner = trainer(tmp_path, [again], max_epochs=2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        runner.fit(GuardedModule({(0, 2): "constant_batch"}), ckpt_path=tmp_path / "a.ckpt")
    assert again.counts == {"constant_batch": 2}
    assert not [w for w in caught if "zero variance" in str(w.message)]


def test_scaler_owns_gradients(tmp_path):
    guard = quiet(gradient="stop")
    runner = trainer(tmp_path, [guard], max_epochs=1)
    runner.strategy.precision_plugin.scaler = object()  # any: the guard only asks whether there is one
    module = GuardedModule({(0, 2): "gradient"})
    runner.fit(module)
    assert not guard.counts


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ({"loss": "ignore"}, "loss: got 'ignore', allowed are stop, skip, warn, off"),
        ({"floor": "skip"}, "floor: got 'skip', allowed are stop, warn, off"),
        ({"max_skips": 0}, "max_skips: got 0"),
        ({"every_n_steps": True}, "every_n_steps: got True"),
    ],
)
def test_impossible_arguments(arguments, line):
    with pytest.raises(ValueError, match=line):
        NonFiniteGuard(**arguments)
