"""answers.jsonl and samples.jsonl as the page holds them: small enough for 512 prompts, four arms and every token."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from rayrlhf.evaluation.report.series import finite, rounded

__all__ = ["plain", "prompt_table", "sample_rows", "scores_by_arm"]

MOST_CHARACTERS = 2_000_000
"""Of the table in the page. Past it the tokens' KL is left out, then prompts are."""
MOST_SAMPLES = 400


def prompt_table(answers: Sequence[Mapping[str, Any]], arms: Sequence[str]) -> dict[str, Any] | None:
    """Rows for the table of held-out prompts.

    Returns:
        {"rows": [...], "vocabulary": [token, ...], "notes": [...]}; an answer's tokens are indices of the vocabulary,
        and its KL is in thousandths of a nat. None without answers.
    """
    vocabulary: dict[str, int] = {}
    rows = [_row(number, record, arms, vocabulary) for number, record in enumerate(answers)]
    rows = [row for row in rows if row["answers"]]
    if not rows:
        return None
    with_kl, kept = _fitting(rows)
    notes = []
    if kept < len(rows):
        notes.append(f"The first {kept} of {len(rows)} prompts are shown; answers.jsonl has all.")
    if with_kl < kept:
        notes.append(f"The KL of every token is shown for the first {with_kl} prompts; answers.jsonl has the rest.")
    return {"rows": rows[:kept], "vocabulary": list(vocabulary), "notes": notes}


def scores_by_arm(answers: Sequence[Mapping[str, Any]], arms: Sequence[str], name: str) -> dict[str, list[float]]:
    """arm -> its answers' `name` (reward or gold)."""
    table: dict[str, list[float]] = {arm: [] for arm in arms}
    for record in answers:
        given = record.get("answers")
        for arm, answer in given.items() if isinstance(given, Mapping) else ():
            score = finite(answer.get(name)) if isinstance(answer, Mapping) else None
            if arm in table and score is not None:
                table[arm].append(score)
    return {arm: scores for arm, scores in table.items() if scores}


def sample_rows(samples: Sequence[Mapping[str, Any]], most: int = MOST_SAMPLES) -> list[dict[str, Any]]:
    """What training drew, evenly thinned over the run."""
    drawn = [s for s in samples if s.get("stage", "ppo") == "ppo" and finite(s.get("step")) is not None]
    stride = max(1, -(-len(drawn) // most))
    return [
        {
            "step": sample["step"],
            "arm": str(sample.get("arm") or "ppo"),
            "prompt": plain(sample.get("prompt")),
            "text": plain(sample.get("response")),
            "length": finite(sample.get("response_tokens")),
            "kl": rounded(finite(sample.get("kl_k1")), 4),
            "truncated": sample.get("truncated") is True,
            **{name: rounded(finite(sample.get(name)), 4) for name in ("reward", "gold") if name in sample},
        }
        for sample in drawn[::stride]
    ]


def plain(text: Any) -> str:
    """Without the chat template's own tokens around it."""
    return re.sub(r"<\|[a-z_]+\|>", "", text).strip() if isinstance(text, str) else ""


def _row(number: int, record: Mapping[str, Any], arms: Sequence[str], vocabulary: dict[str, int]) -> dict[str, Any]:
    given = record.get("answers")
    answers = given if isinstance(given, Mapping) else {}
    return {
        "id": str(record.get("prompt_id", number)),
        "prompt": plain(record.get("prompt")),
        "kind": str(record.get("kind") or ""),
        "answers": {arm: _answer(answers[arm], vocabulary) for arm in arms if isinstance(answers.get(arm), Mapping)},
    }


def _answer(answer: Mapping[str, Any], vocabulary: dict[str, int]) -> dict[str, Any]:
    flags = answer.get("flags")
    short: dict[str, Any] = {name: rounded(finite(answer.get(name)), 4) for name in ("reward", "gold")}
    short["flags"] = [name for name, is_set in flags.items() if is_set] if isinstance(flags, Mapping) else []
    short["truncated"] = answer.get("truncated") is True
    text = answer.get("text") if isinstance(answer.get("text"), str) else ""
    tokens, kl = answer.get("tokens"), answer.get("kl")
    if isinstance(tokens, list) and tokens:
        short["length"] = len(tokens)
    if not (isinstance(tokens, list) and isinstance(kl, list) and tokens and len(tokens) == len(kl)):
        return short | {"text": text}
    nats = [finite(value) for value in kl]
    short["sum"] = rounded(sum(value or 0.0 for value in nats), 4)
    short["kl"] = [None if value is None else round(1000 * value) for value in nats]
    short["tokens"] = [vocabulary.setdefault(str(token), len(vocabulary)) for token in tokens]
    # The page joins the tokens; only a text that is not what they say is kept beside them.
    return short if plain("".join(map(str, tokens))) == plain(text) else short | {"text": text}


def _fitting(rows: list[dict[str, Any]]) -> tuple[int, int]:
    """Takes the KL of tokens from the last rows until all fit, then rows; returns how many of each are left."""
    total, with_kl, kept = sum(map(_size, rows)), len(rows), len(rows)
    while total > MOST_CHARACTERS and with_kl:
        with_kl -= 1
        total -= _size(rows[with_kl])
        for answer in rows[with_kl]["answers"].values():
            answer.pop("kl", None)
        total += _size(rows[with_kl])
    while total > MOST_CHARACTERS and kept > 1:
        kept -= 1
        total -= _size(rows[kept])
    return with_kl, kept


def _size(row: Mapping[str, Any]) -> int:
    return len(json.dumps(row, ensure_ascii=False, separators=(",", ":")))
