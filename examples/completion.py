"""Which training passages drive a language model's completion? EK-FAC at full size beside LoGra from the store.

``python examples/completion.py`` trains the small model of ``language_model.py`` with logging, completes a prompt with
it, and asks both. LoGra answers at once from the rows that training left; EK-FAC makes three more passes over the
data (two to fit, one to score) and is the more accurate of the two.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path

import torch
from logix_like.examples import language_model
from logix_like.examples.language_model import LanguageModel, loss_of, train
from logix_like.examples.text import PADDING, Batch, Words, batch_of, gospels, paragraphs
from torch import Tensor, nn

import logix_like as logix
from logix_like.estimators import EKFAC
from logix_like.objective import IGNORED, Objective
from logix_like.query.result import InfluenceResult

PROMPT = "Jesus said to them,"
WORDS = 8


def complete(model: nn.Module, words: Words, prompt: str, length: int) -> str:
    """``prompt`` with the words that the model thinks most probable behind it."""
    text = prompt
    for _ in range(WORDS):
        tokens = words.encode(text, length)[:-1]  # the last one is the end of the passage
        with torch.no_grad():
            logits = model(tokens[None])[0, -1]
        likely = (words.word(int(number)) for number in logits.argsort(descending=True))
        text += f" {next(word for word in likely if word is not None)}"
    return text


def question_about(prompt: str, completion: str, words: Words, length: int) -> Batch:
    """One query whose loss is that of the completion's words alone."""
    batch = batch_of([completion], {completion: words.encode(completion, length)[:-1]})
    asked = len(words.encode(prompt, length)) - 2  # neither the start nor the end is predicted there
    return Batch(batch.ids, batch.inputs, batch.targets.index_fill(1, torch.arange(asked), PADDING))


def objective() -> Objective:
    """The next word, at the positions that are words."""
    return Objective(
        outputs=lambda model, batch: model(batch.inputs),
        targets=lambda batch: batch.targets.where(batch.mask, IGNORED),
    )


def show(name: str, result: InfluenceResult, seconds: float, texts: Mapping[str, str], k: int = 5) -> None:
    """Print the first proponents."""
    ranking = result.proponents(k)
    print(f"\n{name}, {seconds:.1f} s: training on these lowered the completion's loss most")
    for data_id, score in zip(ranking.ids[0], ranking.scores[0].tolist(), strict=True):
        print(f"  {score:+10.3f}  {data_id:<14} {texts[data_id][:90]}")


def scores_of(result: InfluenceResult) -> dict[str, float]:
    """By passage, of the first query."""
    assert result.data_id is not None  # all scores were asked for
    assert result.scores is not None
    return dict(zip(result.data_id, result.scores[0].tolist(), strict=True))


def agreement(first: InfluenceResult, second: InfluenceResult) -> float:
    """Rank correlation of two results' scores over the samples that both have."""
    by_id = scores_of(second)
    pairs = torch.tensor([(score, by_id[data_id]) for data_id, score in scores_of(first).items()])
    return float(torch.corrcoef(pairs.argsort(0).argsort(0).double().T)[0, 1])


def ask_both(
    run: logix.Run,
    model: nn.Module,
    question: Batch,
    passages: Mapping[str, Tensor],
    texts: Mapping[str, str],
    size: int,
) -> None:
    """LoGra from the store, then EK-FAC."""
    start = time.perf_counter()
    query = run.query_fn(question, loss_of, data_id=question.ids, mask=question.mask)
    logra = run.compute_influence_all(query)
    show("LoGra, from the store", logra, time.perf_counter() - start, texts)
    start = time.perf_counter()
    names = list(passages)
    batches = [batch_of(names[i : i + size], passages) for i in range(0, len(names), size)]
    ekfac = EKFAC(
        model, batches, objective(), data_id=lambda batch: batch.ids, mask=lambda batch: batch.mask, progress=False
    )
    exact = ekfac.influence(question, query_id=question.ids)
    show("EK-FAC, full size", exact, time.perf_counter() - start, texts)
    print(f"\nRank correlation of the two over {len(names):,} passages: {agreement(exact, logra):.2f}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, complete, ask."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompt", default=PROMPT, help="what the model completes")
    parser.add_argument("--text", type=Path, help="train on the paragraphs of this file (between blank lines)")
    parser.add_argument("--quick", action="store_true", help="a smaller model on fewer passages")
    options = parser.parse_args(arguments)
    settings = language_model.QUICK if options.quick else language_model.Settings()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    texts = paragraphs(options.text) if options.text else gospels()
    texts = dict(islice(texts.items(), settings.passages))
    words = Words(list(texts.values()), settings.vocabulary)
    passages = {name: words.encode(text, settings.length) for name, text in texts.items()}
    model = LanguageModel(words.size, settings)
    print(f"Training on {len(passages):,} passages.")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        run = train(model, passages, settings, Path(scratch))
        completion = complete(model, words, options.prompt, settings.length)
        print(f"\nCompletion: {completion}")
        question = question_about(options.prompt, completion, words, settings.length)
        ask_both(run, model, question, passages, texts, settings.batch)


if __name__ == "__main__":
    try:
        main()
    except (logix.LogixError, OSError) as error:
        sys.exit(f"error: {error}")
