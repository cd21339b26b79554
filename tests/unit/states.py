"""Run by test_states.py: any order of what may happen to mlx-lm's functions, against `status`.

A model on its own plays rank 1 of 2: sends and gathers are the identity. So what `generate_step`
yields shows whether the plugin is in effect: logprobs of NaN where the head is skipped.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
import sys

import hypothesis
import mlx.core as mx
import tiny_models
import wrapt
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

import mlx_lm_skiphead

FAMILY = "deepseek_v3"
MODULES = {"family": f"mlx_lm.models.{FAMILY}", "loops": "mlx_lm.generate"}
# What is patched of the family and of the loop: (module, path).
TARGETS = [
    ("family", "Model.__call__"),
    ("family", "DeepseekV3Model.__call__"),
    ("loops", "generate_step"),
]
logging.getLogger("mlx_lm_skiphead").disabled = True
mx.distributed.send = lambda array, to, **_: array


def owner_of(target):
    module, path = target
    *parents, attribute = path.split(".")
    return functools.reduce(getattr, parents, sys.modules[MODULES[module]]), attribute


class Patches(RuleBasedStateMachine):
    """What programs and packages do, in any order."""

    def __init__(self):
        super().__init__()
        self.installed = False
        self.foreign = []

    @rule(mode=st.sampled_from(["on", "hidden"]))
    def install(self, mode):
        mlx_lm_skiphead.install(mode)
        self.installed = True

    @rule()
    def uninstall(self):
        mlx_lm_skiphead.uninstall()
        self.installed = False

    @rule(at=st.sampled_from(TARGETS), how=st.sampled_from(["wrapt", "functools"]))
    def wrap(self, at, how):
        owner, attribute = owner_of(at)
        if how == "wrapt":
            wrapper = wrapt.wrap_function_wrapper(
                owner, attribute, lambda wrapped, instance, args, kwargs: wrapped(*args, **kwargs)
            )
            self.foreign.append((owner, attribute, wrapper))
        else:
            inner = getattr(owner, attribute)

            @functools.wraps(inner)
            def wrapper(*args, **kwargs):
                return inner(*args, **kwargs)

            setattr(owner, attribute, wrapper)

    @precondition(lambda self: self.foreign)
    @rule()
    def unwrap(self):
        owner, attribute, wrapper = self.foreign.pop()
        with contextlib.suppress(wrapt.WrapperNotOutermostError):
            wrapt.unwrap_object(owner, attribute, wrapper, missing_ok=True)

    @rule(at=st.sampled_from(TARGETS))
    def replace(self, at):
        """Wholesale, by what upstream has: as a package that copies the function."""
        owner, attribute = owner_of(at)
        setattr(owner, attribute, UPSTREAM[at])

    @rule(module=st.sampled_from(list(MODULES)))
    def reload(self, module):
        importlib.reload(sys.modules[MODULES[module]])

    @invariant()
    def status_is_true(self):
        status = mlx_lm_skiphead.status()
        assert (status.mode == "off") is not self.installed
        family, loop = status.families[FAMILY], status.loops["generate_step"]
        said = {family.state, loop.state} == {"patched"}
        # A family that is replaced may still be shared: its broadcast is known where it is made.
        may = self.installed and loop.state == "patched"
        for target in (family, loop):
            assert target.state in ("patched", "replaced", "off", "refused"), target
            assert bool(target.reason) is (target.state in ("replaced", "refused")), target
        assert said <= skips() <= may, status
        if self.installed:
            mlx_lm_skiphead.install(status.mode)  # repairs what it can
            status = mlx_lm_skiphead.status()
            again = {status.families[FAMILY].state, status.loops["generate_step"].state}
            assert skips() >= (again == {"patched"}), status

    def teardown(self):
        mlx_lm_skiphead.uninstall()
        for name in MODULES.values():
            importlib.reload(sys.modules[name])


@functools.cache
def model_of(cls):
    """A model of the class that the family's module has now, on rank 1 of 2."""
    model = tiny_models.make(FAMILY, num_hidden_layers=2)
    assert type(model) is cls
    model.model.pipeline_rank, model.model.pipeline_size = 1, 2
    return model


def skips() -> bool:
    model = model_of(sys.modules[MODULES["family"]].Model)
    loops = sys.modules[MODULES["loops"]]
    ((_, logprobs),) = loops.generate_step(mx.array([3, 1, 4]), model, max_tokens=1)
    finite = mx.isfinite(logprobs).tolist()
    assert len(set(finite)) == 1, "a mix of upstream's logits and none"
    return not finite[0]


importlib.import_module(MODULES["family"])
importlib.import_module(MODULES["loops"])
UPSTREAM = {target: getattr(*owner_of(target)) for target in TARGETS}
run_state_machine_as_test(
    Patches,
    settings=hypothesis.settings(
        max_examples=int(sys.argv[1]),
        stateful_step_count=12,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(hypothesis.HealthCheck),
    ),
)
