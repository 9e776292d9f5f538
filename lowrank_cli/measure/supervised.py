"""The evaluation of a fine-tuning run, whatever its data are."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import nn

from lowrank_cli.measure.answers import answer
from lowrank_cli.measure.classification import predict
from lowrank_cli.measure.perplexity import perplexity

if TYPE_CHECKING:
    from lowrank_cli.data.supervised import SupervisedData


def evaluate(model: nn.Module, data: SupervisedData, between: Callable[[], None] = lambda: None) -> dict[str, float]:
    """The numbers of an evaluation on the validation part, `data.best[0]` among them.

    Args:
        model: causal, or with the head of the data's kind.
        data: what is measured with.
        between: called before every batch; what it raises ends the evaluation.
    Returns:
        loss: the mean over response tokens or over examples. For causal data perplexity and tokens too, for a task
        its own metrics.
    """
    if data.kind != "causal":
        result = predict(model, data.validation(), data.kind, between)
        return {"loss": result.loss, **data.score(result.predictions, result.labels)}
    measured = perplexity(model, data.validation(), between)
    numbers = {"loss": measured.loss, "perplexity": measured.perplexity, "tokens": measured.tokens}
    if data.metrics:
        numbers |= data.score(*answer(model, data.answers(), between))
    return numbers
