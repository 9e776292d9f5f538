"""lm-eval without its bars, its logging and what it prints, and without work that it does again and again."""

from __future__ import annotations

import contextlib
import functools
import io
import logging
from collections.abc import Iterator
from contextlib import contextmanager

import lm_eval.api.model
import lm_eval.api.task
import lm_eval.evaluator
import lm_eval.models.huggingface
import lm_eval.utils


class _Silent:
    """In the place of tqdm's bar."""

    def __init__(self, iterable=None, **_):
        self._iterable = iterable

    def __iter__(self) -> Iterator:
        return iter(self._iterable)

    def update(self, _: int = 1) -> None: ...

    def close(self) -> None: ...


@contextmanager
def quiet() -> Iterator[None]:
    """lm-eval without its bars, its logging, what it prints on stdout, and three seconds of looking at the machine.

    Templates are compiled once instead of for every question: of MMLU's prompts that is most of the time.
    """
    modules = (lm_eval.api.task, lm_eval.api.model, lm_eval.models.huggingface)
    before = [module.tqdm for module in modules]
    logger = logging.getLogger("lm_eval")
    level = logger.level
    describe, commit = lm_eval.evaluator.add_env_info, lm_eval.evaluator.get_git_commit_hash
    for module in modules:
        module.tqdm = _Silent
    # what these look up is in our result, or not of this program: the commit is the working directory's
    lm_eval.evaluator.add_env_info = lambda storage: None
    lm_eval.evaluator.get_git_commit_hash = lambda: None
    compile_template = lm_eval.utils.env.from_string
    lm_eval.utils.env.from_string = functools.cache(compile_template)
    logger.setLevel(logging.CRITICAL)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)
        lm_eval.evaluator.add_env_info = describe
        lm_eval.evaluator.get_git_commit_hash = commit
        lm_eval.utils.env.from_string = compile_template
        for module, tqdm in zip(modules, before, strict=True):
            module.tqdm = tqdm
