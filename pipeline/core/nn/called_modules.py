"""Which modules of a network are called: some blocks read a module's weight without calling it."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

from torch import nn


class CalledModules:
    """Notes which modules with an adapter are called, until `check`.

    timm's beit and eva multiply by the weight of a module without calling it. An adapter behind
    such a module, or in its place, would have no effect.

    Args:
        network: Forward hooks are put on its modules.
        names: Names of the modules with an adapter.
    """

    def __init__(self, network: nn.Module, names: Iterable[str]):
        self.names = list(names)
        self.called: set[str] = set()
        watched = dict.fromkeys([*self.names, *map(_parent, self.names)])
        self._hooks: list[Any] = [
            network.get_submodule(name).register_forward_hook(partial(_note, self.called, name))
            for name in watched
        ]

    def remove(self) -> None:
        """Stop noting calls."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def check(self, architecture: str) -> None:
        """Raise ValueError, once after the first batch, for modules that their block did not call.

        Args:
            architecture: The network's name.
        """
        if not self._hooks or not self.called:
            return
        self.remove()
        past = [
            name for name in self.names if name not in self.called and _parent(name) in self.called
        ]
        if not past:
            return
        more = f" and {len(past) - 3} more" if len(past) > 3 else ""
        called_endings = {_last(name) for name in self.names if name in self.called}
        others = sorted(called_endings - {*map(_last, past)})
        raise ValueError(
            f"{architecture} uses the weights of {', '.join(past[:3])}{more} without calling these "
            "modules, so that adapters there do nothing. Name others by their endings, as in "
            f"modules: [{', '.join(others) or '...'}]"
        )


def _note(
    called: set[str],
    name: str,
    module: nn.Module,
    inputs: Any,
    output: Any,
) -> None:
    """Record that a module was called (a forward hook)."""
    called.add(name)


def _parent(name: str) -> str:
    return name.rpartition(".")[0]


def _last(name: str) -> str:
    return name.rpartition(".")[2]
