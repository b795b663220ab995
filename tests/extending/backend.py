"""A hypergradient backend of one's own: reverse mode through the whole inner run."""

from dataclasses import dataclass

import torch

import hypertorch as ht


@dataclass(frozen=True, kw_only=True)
class WholeRun(ht.Hypergradient):
    """Runs the inner loop with a graph, and lets autograd go back through it."""

    def compute(self, loop, variables):
        # `variables` are leaves: the outer variables and the entries of the context.
        with torch.enable_grad():
            state = loop.initial(variables)
            terms = []
            for step in range(loop.num_steps):
                state, _, term = loop.step(state, variables, step)
                if term is not None:  # of the outer loss, after this step
                    terms.append(term)
            outer_loss = loop.outer(state.params, variables) + sum(terms)
        wanted = {name: value for name, value in variables.items() if value.requires_grad}
        grads = torch.autograd.grad(outer_loss, list(wanted.values()), allow_unused=True)
        # None stays None: it says that there is no path, and the library refuses it where a number is expected.
        return ht.hypergradients.BackendResult(
            # All variables are named; those that no derivative is taken in, such as labels in a context, with None.
            grads={**dict.fromkeys(variables), **dict(zip(wanted, grads, strict=True))},
            outer_loss=outer_loss.detach(),
            state=state.detached(),
        )
