"""
The log-probabilities of the tokens that are wanted, by a model that runs on no others.

TRL's own scoring runs the model on every row of a micro-batch, padded to the longest of the rollout batch. [`Scorer`]
hands it less: live tokens alone, packed without padding, where that is proven to give the same; else rows and columns
that hold some. B sequences, S columns of prompt and completion, T of them the completion.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from .attention import packed_arguments, without_mask
from .packing import Cut, Pack, Skip, cut, pack
from .routing import RoutingRecorder


_PROMPT = 6  # columns of the prompt in the proof

# What TRL hands on of images. The first two are by token, and cut with the columns.
_BY_TOKEN = ("token_type_ids", "mm_token_type_ids")
VISION = ("pixel_values", "image_grid_thw", "pixel_attention_mask", "image_sizes", "image_position_ids", *_BY_TOKEN)

# How far two ways to the same log-probabilities may lie apart, as a share of what another prompt does to them: a model
# of random weights hardly looks at its context, so that no number of nats would tell. In bfloat16 a token rounds by up
# to 0.05 nats, and a context is worth a nat or more to a trained model.
_EXACT_SHARE = 1e-4
_HALF_SHARE = 0.25

_NOTHING_TO_SAVE = 0.995  # of the tokens of a micro-batch

# Longer windows of attention are not tried when it starts.
_LONGEST_PROOF = 8192


class Scorer:
    """
    Scores with as few tokens through the model as give the same.

    Args:
        score (`Callable`): TRL's `GRPOTrainer._get_per_token_logps_and_entropies`, bound.
        reason (`str`, *optional*): why all tokens go through the model, if they have to.
        is_half (`bool`, *optional*, defaults to `False`): whether the model computes in half precision.
        routing (`RoutingRecorder`, *optional*): records the experts that tokens are routed to.

    Attributes:
        way (`str` or `None`): `"packed"`, `"cut"` (padding is cut in each micro-batch) or `"whole"`; `None` until
            [`Scorer.prove`].
        reason (`str`): why that way, in a few words.
    """

    def __init__(
        self,
        score: Callable,
        reason: str | None = None,
        is_half: bool = False,
        routing: RoutingRecorder | None = None,
    ):
        self._score = score
        self.way = None if reason is None else "whole"
        self.reason = reason
        self._is_half = is_half
        self._unproven_length = math.inf
        self._routing = routing

    @torch.no_grad()
    def prove(self, model: nn.Module) -> None:
        """
        Finds the way for `model`: scores two short rows as TRL lays them out, packed, and cut, and compares.

        The rows have different lengths, with padding on both sides of both; where the model has a window or chunks of
        attention, one of them is longer. Then other tokens in the first row must leave the second as it is, to the
        last bit: the shapes are the same, and so is the rounding. All ranks must call it together.
        """
        config = model.config.get_text_config()
        rope = _rope_of_the_longest(config)
        if rope is not None:
            self.way = "whole"
            self.reason = f"rotary positions of type {rope!r} depend on the longest row of the padded batch"
            return
        windows = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")]
        windows = [window for window in windows if window]
        self._unproven_length = min((window for window in windows if window > _LONGEST_PROOF), default=math.inf)
        longest = max([8, *(window + 4 for window in windows if window <= _LONGEST_PROOF)])
        input_ids, attention_mask = _two_rows(longest, config.vocab_size, next(model.parameters()).device)
        size = attention_mask.size(1) - _PROMPT
        is_wanted = attention_mask[:, -size:].bool()
        is_second = is_wanted.nonzero()[:, 0] == 1
        is_mixture = getattr(config, "num_experts_per_tok", None) is not None

        def score(tokens: Tensor, layout: Pack | Cut | None = None) -> Tensor:
            return self(model, tokens, attention_mask, size, layout)[0][is_wanted].float()

        def is_same(difference: Tensor) -> bool:
            return difference.mean().item() <= (_HALF_SHARE if self._is_half else _EXACT_SHARE) * context

        def is_nothing(difference: Tensor) -> bool:
            # Other tokens at an expert are other shapes, which round otherwise.
            return is_same(difference) if is_mixture else not difference.any()

        with _evaluating(model):
            expected = score(input_ids)
            other_prompts = torch.cat([input_ids[:, :_PROMPT].flip(1), input_ids[:, _PROMPT:]], 1)
            context = (score(other_prompts) - expected).abs().mean().item()
            if _keeps_state(model):
                reason = "its layers keep a state across rows"
            else:
                try:
                    layout = pack(attention_mask.cpu(), is_wanted.cpu()).to(input_ids.device)
                    packed = score(input_ids, layout)
                    distance = (packed - expected).abs()
                    other_first = torch.cat([input_ids[:1].flip(1), input_ids[1:]])
                    if is_same(distance) and is_nothing((score(other_first, layout) - packed)[is_second].abs()):
                        self.way, self.reason = "packed", f"rows packed and alone differ by {distance.max():.1g} nats"
                        return
                    reason = f"packed rows see one another, and differ from rows alone by {distance.max():.1g} nats"
                except Exception as error:  # whatever a model says that cannot take packed rows
                    reason = f"packed rows fail with {_in_one_line(error)}"
            distance = (score(input_ids, cut(attention_mask.cpu(), is_wanted.cpu())) - expected).abs()
            other_padding = torch.where(attention_mask.bool(), input_ids, input_ids.flip(1))
            if is_same(distance) and is_nothing((score(other_padding) - expected).abs()):
                self.way, self.reason = "cut", reason
            else:
                self.way = "whole"
                self.reason = f"{reason}; without their padding rows differ by {distance.max():.1g} nats"

    def layout(
        self, attention_mask: Tensor, is_wanted: Tensor, has_images: bool = False, needs_all: bool = False
    ) -> Pack | Cut | None:
        """
        What of a micro-batch goes through the model; `None` for all of it.

        Args:
            attention_mask (`Tensor`): `(B, S)`.
            is_wanted (`Tensor`): `(B, T)`, true on completion tokens whose log-probability is wanted.
            has_images (`bool`, *optional*, defaults to `False`): whether rows have images, which are not packed.
            needs_all (`bool`, *optional*, defaults to `False`): whether the loss is of all tokens, as that of routers.
        """
        if self.way == "whole":
            return None
        device, attention_mask, is_wanted = attention_mask.device, attention_mask.cpu(), is_wanted.cpu()
        if self.way == "packed" and not has_images:
            packed = pack(attention_mask, is_wanted, keeps_all=needs_all)
            if packed is None or max(packed.lengths) > self._unproven_length:
                return None
            if len(packed.tokens) > _NOTHING_TO_SAVE * attention_mask.numel():
                return None  # the indices of a pack would take more memory than it saves
            return packed.to(device)
        return cut(attention_mask, is_wanted, keeps_rows=has_images or needs_all)

    def __call__(
        self,
        model: nn.Module,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        layout: Pack | Cut | Skip | None,
        logps: Tensor | None = None,
        entropy: Tensor | None = None,
        records: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """
        Log-probabilities and entropies, `(B, T)`, where they are wanted, with gradient.

        Args:
            model, input_ids, attention_mask, logits_to_keep, **kwargs: as TRL's.
            layout ([`Pack`], [`Cut`], [`Skip`] or `None`): what goes through the model, of [`Scorer.layout`].
            logps (`Tensor`, *optional*): `(B, T)`, what stands where nothing was scored; 0 if not given.
            entropy (`Tensor`, *optional*): scalar, entropy of a token where none was scored in this micro-batch;
                where some were, their mean stands for the others.
            records (`bool`, *optional*, defaults to `False`): whether to record experts.

        Returns:
            `tuple`: log-probabilities; entropies and auxiliary loss as TRL's, `None` where not asked for; and the
            experts that predicted each token, `(B, T, L, K)`, if they are recorded.
        """
        if not records:
            routing, experts_of = nullcontext(), lambda tokens: None
        else:
            routing, experts_of = self._routing, lambda tokens: self._routing.experts(*tokens.shape)
        if layout is None:
            with routing:
                scored = self._score(model, input_ids, attention_mask, logits_to_keep, **kwargs)
            experts = experts_of(input_ids)
            return *scored, experts if experts is None else experts[:, -logits_to_keep - 1 : -1]

        if logps is None:
            logps = torch.zeros(len(input_ids), logits_to_keep, device=input_ids.device)
        if isinstance(layout, Skip):
            # A leaf that nobody reads: what comes after takes a gradient, and no weight is reached.
            leaf = logps.new_zeros((), requires_grad=torch.is_grad_enabled())
            entropy = logps.new_zeros(()) if entropy is None else entropy
            entropies = entropy.expand(logps.shape) if kwargs.get("compute_entropy") else None
            return logps.detach() + leaf, entropies, None, None
        if isinstance(layout, Pack):
            tokens = layout.input_ids(input_ids)
            forward = _packed(model, layout, layout.next_tokens(input_ids))
            mask, size = torch.ones_like(tokens), tokens.size(1)
        else:
            rows, columns = layout.rows, slice(layout.first, layout.end)
            forward, tokens, mask = model, input_ids[rows][:, columns], attention_mask[rows][:, columns]
            size = layout.end - input_ids.size(1) + logits_to_keep
            if layout.is_stub:
                mask = torch.ones_like(mask)
            kwargs |= {name: kwargs[name][:, columns] for name in _BY_TOKEN if kwargs.get(name) is not None}
        with routing:
            values, entropies, aux_loss = self._score(forward, tokens, mask, size, **kwargs)
        experts = experts_of(tokens)
        if experts is not None:
            # A packed token stands where it predicts the next; in TRL's rows, one before.
            experts = experts if isinstance(layout, Pack) else experts[:, -size - 1 : -1]
            experts = layout.scatter(experts, experts.new_zeros(*logps.shape, *experts.shape[2:]))
        if entropies is not None:
            scored = layout.scored(entropies.detach(), mask)
            if scored.numel():
                entropy = scored.mean()
            elif entropy is None:
                entropy = scored.new_zeros(())
            entropies = layout.scatter(entropies, entropy.expand(logps.shape))
        return layout.scatter(values, logps), entropies, aux_loss, experts


def _packed(model: nn.Module, layout: Pack, next_tokens: Tensor) -> Callable:
    """`model`, which takes TRL's call for packed rows."""
    arguments = {"position_ids": layout.positions}
    if layout.is_packed:
        arguments |= packed_arguments(_implementation(model), layout.lengths, next_tokens.device)

    def forward(input_ids: Tensor, attention_mask: Tensor, labels: Tensor, **kwargs: Any) -> Any:
        with without_mask() if layout.is_packed else nullcontext():
            return model(input_ids=input_ids, shift_labels=next_tokens, **arguments, **kwargs)

    return forward


def has_images(arguments: dict[str, Any]) -> bool:
    """Whether TRL's arguments of scoring, or its inputs of the loss, hold something of images."""
    return any(arguments.get(name) is not None for name in VISION)


def _implementation(model: nn.Module) -> str:
    # DeepSpeed's engine has a `config` of its own.
    while not isinstance(getattr(model, "config", None), PretrainedConfig):
        model = model.module
    return model.config.get_text_config()._attn_implementation


def _two_rows(longest: int, vocabulary: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Prompts of 3 and 4 tokens in 6 columns, completions of 5 and `longest` in two more than that."""
    attention_mask = torch.zeros(2, _PROMPT + longest + 2, dtype=torch.long, device=device)
    attention_mask[0, 3 : _PROMPT + 5] = attention_mask[1, 2 : _PROMPT + longest] = 1
    # From the middle of the vocabulary, where no model has its special tokens.
    tokens = torch.arange(attention_mask.numel(), device=device).view(attention_mask.shape)
    return vocabulary // 3 + tokens * 7 % max(vocabulary // 3, 1), attention_mask


def _keeps_state(model: nn.Module) -> bool:
    """Whether layers carry something from token to token beside attention: recurrence, or a convolution."""
    kinds = getattr(model.config.get_text_config(), "layer_types", None) or []
    is_recurrent = any(not kind.endswith("attention") or kind == "linear_attention" for kind in kinds)
    return is_recurrent or any(getattr(module, "_is_stateful", False) for module in model.modules())


def _rope_of_the_longest(config: PretrainedConfig) -> str | None:
    """The type of rotary positions, if what they do to a row depends on the longest one beside it."""
    found = [getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}]
    found += [value for value in found[0].values() if isinstance(value, dict)]  # by type of layer
    types = (parameters.get("rope_type", parameters.get("type")) for parameters in found)
    return next((kind for kind in types if kind in ("longrope", "dynamic")), None)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _in_one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
