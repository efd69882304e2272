"""How one answer is to be chosen, and the choice itself: each row of a batch has its own settings and random numbers.

`generate` runs greedily over scores of which `RowSampler` leaves one token a row, so that requests of different
settings share a batch and none depends on its neighbours. The scores are shaped by transformers' own processors.
"""

import math
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from transformers.generation import (
    LogitsProcessor,
    MinLengthLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from visualglm_hf.chat import RefuseNan
from visualglm_tools.serving.engine.grammar import Grammar


MAX_SEED = 2**63 - 1
MAX_STOPS = 16
MAX_STOP_CHARACTERS = 200
MIN_TEMPERATURE = 1e-3  # below, scores divided by it would overflow
PENALTIES = (0.01, 100)
MAX_PENALTY = 2  # of presence and frequency, either way, as OpenAI has it
MAX_BIAS = 100
MAX_TOP_LOGPROBS = 20


@dataclass(frozen=True)
class Settings:
    """How to choose the tokens of an answer; the defaults are those of the original's `chat`.

    Args:
        max_new_tokens: of the answer; None for as many as the context has room for.
        max_length: of prompt and answer together, in tokens; None for the model's context.
        min_new_tokens: of the answer: before, it does not end.
        min_length: of prompt and answer together: before, the answer does not end.
        temperature: 0, or anything below `MIN_TEMPERATURE`, always takes the likeliest token; then top_p, top_k and
            seed do not matter.
        top_p: choose among the likeliest tokens that together have this probability.
        top_k: choose among this many likeliest tokens; 0 for all.
        repetition_penalty: for tokens that prompt and answer contain already; 1 for none.
        seed: makes the answer repeatable, whatever runs beside it; None takes a new one.
        stop: the answer ends before the first of these texts.
        suppress_tokens: token ids that the answer may not contain.
        presence_penalty: taken from the score of each token that the answer has already; the prompt does not count.
        frequency_penalty: taken from it as often as the answer has the token.
        logit_bias: added to the scores of tokens, by their ids.
        grammar: what the answer must be. It is given as its tokens say it, as with `is_raw`.
        top_logprobs: how many of the likeliest tokens to tell beside each chosen one; None to tell nothing.
        is_raw: whether to give the text as its tokens say it, without the original's clean-up.

    Raises:
        ValueError: a value out of its range.
    """

    max_new_tokens: int | None = None
    max_length: int | None = None
    min_new_tokens: int = 0
    min_length: int = 0
    temperature: float = 0.8
    top_p: float = 0.4
    top_k: int = 100
    repetition_penalty: float = 1.2
    seed: int | None = None
    stop: Sequence[str] = ()
    suppress_tokens: Sequence[int] = ()
    presence_penalty: float = 0
    frequency_penalty: float = 0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    grammar: Grammar | None = None
    top_logprobs: int | None = None
    is_raw: bool = False

    def __post_init__(self):
        check = self._check
        check("max_new_tokens", self.max_new_tokens is None or self.max_new_tokens >= 1, "1 or more")
        check("max_length", self.max_length is None or self.max_length >= 1, "1 or more")
        check("min_new_tokens", self.min_new_tokens >= 0, "0 or more")
        check("min_length", self.min_length >= 0, "0 or more")
        check("temperature", 0 <= self.temperature < math.inf, "0 (for the likeliest token) or more")
        check("top_p", 0 <= self.top_p <= 1, "from 0 to 1")
        check("top_k", self.top_k >= 0, "0 (for all tokens) or more")
        low, high = PENALTIES
        check("repetition_penalty", low <= self.repetition_penalty <= high, f"from {low} to {high} (1 for none)")
        check("seed", self.seed is None or 0 <= self.seed <= MAX_SEED, f"from 0 to {MAX_SEED}")
        is_usable = not isinstance(self.stop, str) and len(self.stop) <= MAX_STOPS
        is_usable = is_usable and all(0 < len(text) <= MAX_STOP_CHARACTERS for text in self.stop)
        check("stop", is_usable, f"a list of up to {MAX_STOPS} texts of 1 to {MAX_STOP_CHARACTERS} characters")
        for name in ("presence_penalty", "frequency_penalty"):
            check(name, abs(getattr(self, name)) <= MAX_PENALTY, f"from -{MAX_PENALTY} to {MAX_PENALTY}")
        is_usable = all(abs(each) <= MAX_BIAS for each in self.logit_bias.values())
        check("logit_bias", is_usable, f"numbers from -{MAX_BIAS} to {MAX_BIAS} by the ids of tokens")
        is_usable = self.top_logprobs is None or 0 <= self.top_logprobs <= MAX_TOP_LOGPROBS
        check("top_logprobs", is_usable, f"from 0 to {MAX_TOP_LOGPROBS}")

    @property
    def is_greedy(self) -> bool:
        return self.temperature < MIN_TEMPERATURE

    def _check(self, name: str, is_valid: bool, expected: str) -> None:
        if not is_valid:
            raise ValueError(f"{name} must be {expected}, found {getattr(self, name)!r}.")


@dataclass(frozen=True)
class TokenLogprob:
    """A token of an answer, and how likely the model found it: before settings, masks and penalties.

    Args:
        token_id, logprob: of the token that was chosen.
        top: (token_id, logprob) of the likeliest ones, the likeliest first.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


def logprob_of(scores: torch.Tensor, chosen: torch.Tensor, top: int) -> TokenLogprob:
    """The log-probability of the `chosen` token [1] by the model's `scores` [1, V], and the `top` likeliest ones."""
    logprobs = scores[0].float().log_softmax(dim=-1)
    values, ids = logprobs.topk(min(top, len(logprobs)))
    likeliest = tuple(zip(ids.tolist(), values.tolist(), strict=True))
    return TokenLogprob(chosen.item(), logprobs[chosen].item(), likeliest)


class Chooser:
    """Chooses the tokens of one answer, as `generate` would if it ran alone with these settings and this seed."""

    def __init__(
        self, settings: Settings, prompt_length: int, vocab_size: int, eos_token_id: int, device: torch.device
    ):
        self.vocab_size = vocab_size  # of the tokenizer: the model has rows beyond it, which mean nothing
        min_length = max(settings.min_length, prompt_length + settings.min_new_tokens)
        settings = replace(settings, min_length=min_length if min_length > prompt_length else 0)
        self.processors = score_processors(settings, prompt_length, eos_token_id, device)
        self.top_logprobs, self.logprobs = settings.top_logprobs, []  # of the tokens so far
        self.generator = None
        if not settings.is_greedy:
            seed = secrets.randbelow(MAX_SEED) if settings.seed is None else settings.seed
            self.generator = torch.Generator(device).manual_seed(seed)

    def choose(self, token_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """The next token [1] after `token_ids` [1, S], without padding, by `scores` [1, V].

        Raises:
            ValueError: NaN among the scores.
        """
        width = scores.shape[1]
        raw = scores = scores[:, : self.vocab_size]
        for process in self.processors:  # a LogitsProcessorList would look up each one's signature for every token
            scores = process(token_ids, scores)
        if self.generator is None:
            chosen = scores.argmax(dim=-1)
        else:
            # Of all rows again, as `generate` draws: how many there are decides what is drawn for the next tokens.
            scores = F.pad(scores, (0, width - self.vocab_size), value=-torch.inf)
            chosen = torch.multinomial(scores.softmax(dim=-1), num_samples=1, generator=self.generator)[0]
        if self.top_logprobs is not None:
            self.logprobs.append(logprob_of(raw, chosen, self.top_logprobs))
        return chosen


class OpenAIPenalties(LogitsProcessor):
    """OpenAI's penalties for tokens that the answer has already.

    Args:
        presence, frequency: once for each token, and for each time that it is there.
        prompt_length: tokens before the answer.
    """

    def __init__(self, presence: float, frequency: float, prompt_length: int):
        self.presence, self.frequency, self.prompt_length = presence, frequency, prompt_length

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        token_ids, counts = input_ids[0, self.prompt_length :].unique(return_counts=True)
        return scores.index_add(1, token_ids, -(self.presence + self.frequency * counts.to(scores.dtype))[None])


class Biases(LogitsProcessor):
    """Adds to the scores of some tokens, given as {id: how much}."""

    def __init__(self, biases: Mapping[int, float], device: torch.device):
        self.token_ids = torch.tensor(list(biases), device=device)
        self.values = torch.tensor([list(biases.values())], dtype=torch.float32, device=device)

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        return scores.index_add(1, self.token_ids, self.values.to(scores.dtype))


def score_processors(
    settings: Settings, prompt_length: int, eos_token_id: int, device: torch.device
) -> list[LogitsProcessor]:
    """What `generate` would put together for these settings, in its order, with what it does not know between."""
    processors: list[LogitsProcessor] = []
    if settings.repetition_penalty != 1:
        processors.append(RepetitionPenaltyLogitsProcessor(penalty=float(settings.repetition_penalty)))
    if settings.min_length:
        processors.append(MinLengthLogitsProcessor(settings.min_length, eos_token_id, device=device))
    if settings.suppress_tokens:
        processors.append(SuppressTokensLogitsProcessor(list(settings.suppress_tokens), device=device))
    if settings.presence_penalty or settings.frequency_penalty:
        penalties = (float(settings.presence_penalty), float(settings.frequency_penalty))
        processors.append(OpenAIPenalties(*penalties, prompt_length))
    if settings.logit_bias:
        processors.append(Biases(settings.logit_bias, device))
    processors.append(RefuseNan())
    if settings.grammar is not None:
        processors.append(settings.grammar.start(prompt_length))
    if not settings.is_greedy:
        processors.append(TemperatureLogitsWarper(float(settings.temperature)))
        if settings.top_k:
            processors.append(TopKLogitsWarper(settings.top_k))
        if settings.top_p < 1:
            processors.append(TopPLogitsWarper(float(settings.top_p)))
    return processors


class RowSampler(LogitsProcessor):
    """Leaves each row of a batch the one token that its own settings choose."""

    def __init__(self, rows: Sequence, pad_token_id: int):
        self.rows, self.pad_token_id = rows, pad_token_id

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        chosen = torch.cat([self.choose(index, row, input_ids, scores) for index, row in enumerate(self.rows)])
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen[:, None], 0.0)

    def choose(self, index: int, row, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if row.is_live:
            try:
                # Without the padding: what a row sees is what it would see alone.
                return row.chooser.choose(
                    input_ids[index : index + 1, -len(row.token_ids) :], scores[index : index + 1]
                )
            except (ValueError, RuntimeError) as error:  # NaN, or torch's; the other rows have nothing to do with it
                row.fail(error)
        return torch.full((1,), self.pad_token_id, device=scores.device)
