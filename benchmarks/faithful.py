"""What `analysis faithful` costs: all interventions over one plain evaluation of the same rows."""

import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from parts import made_up_rows, ratio_of_times, row_tokenizer, small_model, table

from analysis.chains import Chains
from analysis.interventions import Latents, Plain, choose_donors
from analysis.probe import Probe, load_probe, read_config
from coconut import Coconut

ROWS, NEW_TOKENS = 32, 8  # as many as an answer takes: "### ", digits, eos
CHAIN_TOKENS = 43  # and with its chain: the mean of made_up_rows()


@contextmanager
def counted_positions() -> Iterator[list[int]]:
    """The positions of every pass that is run meanwhile, padding included."""
    counts: list[int] = []
    run_pass = Coconut.run_pass

    def counting(self: Coconut, embeds: Any, *more: Any) -> Any:
        counts.append(embeds.shape[0] * embeds.shape[1])
        return run_pass(self, embeds, *more)

    Coconut.run_pass = counting  # type: ignore[method-assign]
    try:
        yield counts
    finally:
        Coconut.run_pass = run_pass  # type: ignore[method-assign]


def positions_of(step: Callable[[], object]) -> int:
    with counted_positions() as counts:
        step()
    return sum(counts)


def make_probe(folder: Path, **keys: Any) -> Probe:
    """A model with random weights, six latents in stage 3, made-up rows of GSM8K's lengths."""
    tokenizer = row_tokenizer()
    small_model(vocab_size=len(tokenizer) + 5, layers=4, hidden=256).save_pretrained(
        folder / "model"
    )
    tokenizer.save_pretrained(folder / "model")
    (folder / "rows.json").write_text(json.dumps(made_up_rows(ROWS)))
    values = dict(name="x", save_path=str(folder), c_thought=2, max_latent_stage=3, resume=8)
    values |= dict(epochs_per_stage=2, num_epochs=8, only_eval=True, max_new_tokens=NEW_TOKENS)
    values |= dict(model_id=str(folder / "model"), load_model_path=str(folder / "model"))
    values |= dict(val_path=str(folder / "rows.json"), batch_size_eval=32, **keys)
    (folder / "config.yaml").write_text(json.dumps(values))
    return load_probe(read_config(str(folder / "config.yaml")))


def intervene_on_latents(probe: Probe) -> list[dict]:
    latents = Latents(probe, probe.dataset(None), sigma=1.0)
    plain: Plain = latents.plain()
    donors = choose_donors(plain.answers, probe.text_format, 0)
    return [latents.intervene(plain, donors, rows) for rows in latents.batches()]


def intervene_on_chains(probe: Probe) -> list[dict]:
    chains = Chains(probe, probe.dataset(None), sigma=1.0)
    written = chains.plain()
    donors = choose_donors(written.answers, probe.text_format, 0)
    return [chains.intervene(written, donors, rows) for rows in chains.batches()]


def measure_faithful() -> None:
    """All interventions with six latents, and the control, over plain evaluations."""
    rows, costs = [], []
    kinds = {
        "latents: 57 interventions": (intervene_on_latents, dict(coconut=True)),
        "written chains: 4": (intervene_on_chains, dict(cot=True, max_new_tokens=CHAIN_TOKENS)),
    }
    for name, (battery, keys) in kinds.items():
        with tempfile.TemporaryDirectory() as folder:
            probe = make_probe(Path(folder), **keys)
            dataset = probe.dataset(None)
            plain = lambda: probe.answers(dataset, list(range(ROWS)))
            every = lambda: battery(probe)
            positions, own = positions_of(every), positions_of(plain)
            ratio, (seconds, seconds_of_plain) = ratio_of_times(every, plain, 3)
        rows.append([name, positions / own, ratio, seconds])
        costs.append((positions, seconds, own, seconds_of_plain))
    positions, seconds, *_ = (sum(of_both) for of_both in zip(*costs))
    own, seconds_of_plain = costs[0][2:]
    rows.append(["both, over the first's", positions / own, seconds / seconds_of_plain, seconds])
    table(
        f"analysis faithful over one plain evaluation: {ROWS} rows, {NEW_TOKENS} tokens written, "
        f"{CHAIN_TOKENS} with a chain",
        ["the plain run included", "positions", "CPU time", "CPU seconds"],
        rows,
    )
