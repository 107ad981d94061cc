"""How likely responses are to the teacher."""

from __future__ import annotations

from collections.abc import Sequence

from pair import Pair

from megatron_opdlm.diffusion.trajectory import Trajectory
from megatron_opdlm.reporting.progress import progress_bar

PASS_RESPONSES = 16
"""Responses between two movements of the progress bar."""

Text = tuple[tuple[int, ...], tuple[int, ...]]
"""Token ids of a prompt, and of a response with its end of sequence and nothing after it."""


class Likelihood:
    """Minus log probability of responses under the causal teacher at temperature 1.

    The mask token is in no softmax, as in training. A response that several settings gave is read
    once.
    """

    def __init__(self, pair: Pair) -> None:
        """Starts without any known response."""
        self._pair = pair
        self._known: dict[Text, float] = {}

    def nats(self, trajectories: Sequence[Trajectory], name: str) -> list[float]:
        """Returns the minus log probability of every response, summed over its tokens.

        Args:
            trajectories: responses with their prompts, from any writer.
            name: name of the responses, for the progress bar.
        """
        texts = [(tuple(t.prompt_ids.tolist()), tuple(t.text_ids.tolist())) for t in trajectories]
        new = {text: t for text, t in zip(texts, trajectories, strict=True) if self._is_new(text)}
        self._read(list(new.items()), name)
        return [self._known[text] for text in texts]

    def _is_new(self, text: Text) -> bool:
        return text not in self._known

    def _read(self, new: Sequence[tuple[Text, Trajectory]], name: str) -> None:
        with progress_bar(len(new), f"likelihood of {name}", is_main=True, leave=False) as bar:
            for start in range(0, len(new), PASS_RESPONSES):
                part = new[start : start + PASS_RESPONSES]
                losses = self._pair.teacher.token_losses(
                    [t.token_ids[: len(t.prompt_ids) + t.num_response_tokens] for _, t in part],
                    [len(t.prompt_ids) for _, t in part],
                    self._pair.student.mask_token_id,
                )
                for (text, _), of_tokens in zip(part, losses, strict=True):
                    self._known[text] = float(of_tokens.sum())
                bar.update(len(part))
