"""Our models as lm-eval's `HFLM`: the same requests, tokens and scores, with progress and a count of long contexts."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence

import lm_eval.api.model
from lm_eval.models.huggingface import HFLM
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lowrank_cli.errors import PreflightError
from lowrank_cli.evaluate.progress import Progress
from lowrank_cli.evaluate.scoring import Row, Scorer, not_numbers, rows_that_fit
from lowrank_cli.evaluate.silence import quiet

# requests that are tokenized, scored and kept in memory at once
PIECE = 4096
_CUT = "truncated "


class EvaluatedLM(HFLM):
    """A loaded causal language model.

    Args:
        model: on its device.
        tokenizer: with a bos or an eos token.
        batch_size: requests in a pass; None finds what fits.
        max_length: tokens of context; the model's own unless given.
        progress: told of every answer.
        share: compute what contexts begin with in common once, see `scoring`; otherwise lm-eval scores.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        batch_size: int | None,
        progress: Progress,
        max_length: int | None = None,
        share: bool = True,
    ):
        with quiet():
            super().__init__(
                pretrained=model,
                tokenizer=tokenizer,
                batch_size=batch_size or "auto",
                max_length=max_length,
                backend="causal",
            )
        self.progress, self.share = progress, share
        self.scorer = Scorer(model, batch_size)
        self._long: set[tuple[str, ...]] = set()
        self._encoded: dict[str, list[int]] = {}

    def set_cache_hook(self, cache_hook) -> None:
        """Every answer goes to lm-eval's cache of responses, and to the progress."""
        if cache_hook.dbdict is not None:
            # a write-ahead log instead of a journal file made and deleted for every answer
            cache_hook.dbdict.conn.execute("PRAGMA journal_mode=WAL")
        super().set_cache_hook(_Counted(cache_hook, self.progress, self._long))

    @property
    def num_truncated(self) -> int:
        """Contexts that were cut on the left, those of answers that were taken over among them."""
        return self.cache_hook.num_truncated

    def loglikelihood(self, requests: list, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """lm-eval's, in pieces: the tokens of all of MMLU's requests would take gigabytes."""
        self.progress.begin("answers scored", len(requests))
        answers = []
        for start in range(0, len(requests), PIECE):
            piece = requests[start : start + PIECE]
            self._encode([text for request in piece for text in self._texts(*request.args)])
            answers += super().loglikelihood(piece, disable_tqdm=True)
            self._encoded.clear()
        return answers

    def loglikelihood_rolling(self, requests: list, disable_tqdm: bool = False) -> list[float]:
        """lm-eval's, a few documents at a time: those that are done are kept when it is interrupted."""
        self.progress.begin("documents scored", len(requests))
        step = self.scorer.batch_size or 4
        answers = []
        for start in range(0, len(requests), step):
            answers += super().loglikelihood_rolling(requests[start : start + step], disable_tqdm=True)
        return answers

    def generate_until(self, requests: list, disable_tqdm: bool = False) -> list[str]:
        """lm-eval's; raises PreflightError if the longest answer leaves no room for the question."""
        self.progress.begin("answers written", len(requests))
        longest = max((request.args[1].get("max_gen_toks", self.max_gen_toks) for request in requests), default=0)
        if longest >= self.max_length:
            raise PreflightError(
                f"{requests[0].task_name} lets a model write {longest} tokens, and this one has a context of "
                f"{self.max_length}",
                "take a model with a longer context, or leave the task out",
            )
        return super().generate_until(requests, disable_tqdm=True)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs) -> list[int]:
        if add_special_tokens is None and not kwargs and string in self._encoded:
            return self._encoded[string]
        return super().tok_encode(string, add_special_tokens=add_special_tokens, **kwargs)

    def tok_batch_encode(self, strings, padding_side="left", left_truncate_len=None, truncation=False):
        """lm-eval's, with contexts that are cut counted."""
        tokens, mask = super().tok_batch_encode(strings, padding_side, None, truncation)
        if left_truncate_len:
            cut = (mask.sum(1) > left_truncate_len).tolist()
            self._long.update((string,) for string, is_cut in zip(strings, cut, strict=True) if is_cut)
            tokens, mask = tokens[:, -left_truncate_len:], mask[:, -left_truncate_len:]
        return tokens, mask

    def _texts(self, context: str, continuation: str) -> tuple[str, ...]:
        """Return the texts that lm-eval's `_encode_pair` is going to tokenize; none for a blank context."""
        if not context:
            return ()
        stripped = context.rstrip()
        return (stripped, context + continuation) if stripped else ()

    def _encode(self, texts: Sequence[str]) -> None:
        """Tokenize texts in one call, which takes all cores; `tok_encode` then finds them."""
        bos = self.tokenizer.decode(self.prefix_token_id)
        plain = [text for text in dict.fromkeys(texts) if not text.startswith(bos)]
        if plain and self.add_bos_token is None:
            encoded = self.tokenizer(plain, return_attention_mask=False, verbose=False)["input_ids"]
            self._encoded = dict(zip(plain, encoded, strict=True))

    def _detect_batch_size(self, requests=None, pos: int = 0) -> int:
        """Rows of a generation: lm-eval tries passes of 64 full contexts, which a machine without a GPU never ends."""
        length = min(self.max_length, 2048)
        return min(rows_that_fit(self.model, length, 1, length), 64 if self.device.type == "cuda" else 8)

    def _loglikelihood_tokens(
        self, requests: list, disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        limit = self.max_length + 1
        longest = max((len(continuation) for _, _, continuation in requests), default=0)
        if longest > self.max_length:
            raise PreflightError(
                f"an answer has {longest} tokens, and the model a context of {self.max_length}",
                "take a model with a longer context, or leave the task out",
            )
        self._long.update(key for key, context, answer in requests if key and len(context) + len(answer) > limit)
        if not self.share:
            answers = super()._loglikelihood_tokens(requests, disable_tqdm=True, override_bs=override_bs)
        else:
            answers = self._shared(requests, limit)
        if any(math.isnan(score) for score, _ in answers):
            raise not_numbers()
        return answers

    def _shared(self, requests: list, limit: int) -> list[tuple[float, bool]]:
        # requests that have their input in common, such as answers of one token, are one row
        members: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for i, (_, context, continuation) in enumerate(requests):
            members[tuple((context + continuation)[-limit:][:-1])].append(i)
        rows = [Row(tokens, tuple(tuple(requests[i][2]) for i in m)) for tokens, m in members.items()]
        numbers = list(members.values())
        answers: list = [None] * len(requests)
        for number, scores in self.scorer.score(rows):
            for i, score in zip(numbers[number], scores, strict=True):
                answers[i] = score
                if requests[i][0] is not None:
                    self.cache_hook.add_partial("loglikelihood", requests[i][0], score)
        return answers


class _Counted:
    """lm-eval's hook on answers, which also advances the progress and keeps which contexts were cut."""

    def __init__(self, hook, progress: Progress, long: set[tuple[str, ...]]):
        self._hook, self._progress, self._long = hook, progress, long
        self._count = 0

    def add_partial(self, attr, req, res) -> None:
        self._hook.add_partial(attr, req, res)
        key = tuple(req) if attr == "loglikelihood" else (req[0],)
        if key in self._long:
            self._count += 1
            if self._hook.dbdict is not None:
                # beside the answer, so that a resumed evaluation counts it too
                self._hook.dbdict[_CUT + lm_eval.api.model.hash_args(attr, req)] = True
        self._progress.advance()

    @property
    def num_truncated(self) -> int:
        if self._hook.dbdict is None:
            return self._count
        return sum(key.startswith(_CUT) for key in self._hook.dbdict)

    def close(self) -> None:
        """End the thread that writes answers."""
        if self._hook.dbdict is not None:
            self._hook.dbdict.close()
