"""Turns ``voices.txt`` into the training and evaluation records of the shipped adapters.

    python adapters/shipped/recipes/make_data.py build/voices

writes ``<voice>.jsonl`` and ``<voice>-eval.jsonl`` for each voice. Nothing is random: the same text
gives the same bytes. Besides the plain questions some are asked under other system prompts, and
some follow another one in the same conversation, so that the voice does not hang on the default
prompt or on the first turn.
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

SOURCE = Path(__file__).with_name("voices.txt")
VOICES = {"pirate": "P", "bard": "B"}
# Said before the verse, in turn: a small model picks up a fixed opening sooner than a metre.
OPENINGS = {
    "P": ("",),
    "B": ("Hark, gentle friend!\n", "Attend, good soul!\n", "O hear my song!\n"),
}
EVALUATION_EVERY = 10
SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "Answer the user's question briefly.",
    "You are a knowledgeable and friendly guide.",
)

Message = dict[str, str]


@dataclass(frozen=True, slots=True)
class Entry:
    """A question and its answer in one voice."""

    question: str
    answer: str

    def turn(self) -> list[Message]:
        """The exchange as chat messages."""
        return [
            {"role": "user", "content": self.question},
            {"role": "assistant", "content": self.answer},
        ]


def read_entries(letter: str) -> list[Entry]:
    """Every question of the source with the answer marked ``letter``."""
    entries: list[Entry] = []
    for paragraph in SOURCE.read_text(encoding="utf-8").split("\n\n"):
        lines = [line for line in paragraph.splitlines() if not line.startswith("#")]
        marked = dict(line.split(": ", 1) for line in lines)
        if marked:
            opening = OPENINGS[letter][len(entries) % len(OPENINGS[letter])]
            answer = opening + marked[letter].strip().replace(" / ", "\n")
            entries.append(Entry(marked["Q"].strip(), answer))
    return entries


def training_records(entries: list[Entry]) -> list[list[Message]]:
    """Each entry alone; one in four also under a system prompt, one in four as a second turn."""
    records = [entry.turn() for entry in entries]
    for index, entry in enumerate(entries):
        if index % 4 == 1:
            prompt = SYSTEM_PROMPTS[index // 4 % len(SYSTEM_PROMPTS)]
            records.append([{"role": "system", "content": prompt}, *entry.turn()])
        elif index % 4 == 3:
            records.append(entries[index - 2].turn() + entry.turn())
    return records


def write(path: Path, records: list[list[Message]]) -> None:
    """One record a line."""
    lines = (json.dumps({"messages": record}, ensure_ascii=False) + "\n" for record in records)
    path.write_text("".join(lines), encoding="utf-8")
    print(f"{path}: {len(records)} records")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("out", type=Path, help="folder for the JSONL files")
    out: Path = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    for voice, letter in VOICES.items():
        entries = read_entries(letter)
        held_out = entries[EVALUATION_EVERY - 1 :: EVALUATION_EVERY]
        kept = [entry for entry in entries if entry not in held_out]
        write(out / f"{voice}.jsonl", training_records(kept))
        write(out / f"{voice}-eval.jsonl", [entry.turn() for entry in held_out])


if __name__ == "__main__":
    main()
