"""Check that code, help and documents use the glossary's words: one word for one thing.

Usage: check_words.py [PATH...], by default all files under version control. Prints each line with a word that the
glossary replaces, with the word to use, and exits 1 where there is one. A line that needs such a word in another sense
is listed in ALLOWED.
"""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SUFFIXES = {".py", ".md", ".toml", ".sh", ".j2", ".js", ".html", ".yml", ".yaml"}
# CHANGELOG.md has the table of old names.
LEFT_OUT = ("CHANGELOG.md", "docs/check_words.py", "benchmarks/results/", "benchmarks/skeletons/", "docs/reference/")

WORDS = {
    r"[Pp]ictures?": "image",
    r"[Ii]mage titles?\b|\btitles? of (an|the|its) image|title[_-]column": "caption (training), query (search)",
    r"[Uu]nit rows?\b|[Ss]tored rows?\b|StoredRows|(image|text|query)_rows|\brows of the tower": "embeddings",
    r"EngineWarning|EngineChoice|engine_seconds|\b(other|each|every|which) engine\b": "backend",
    r"(?<!\.)\b[Pp]lans?\b(?=.*TensorRT)|TensorRT('s)? plans?": "TensorRT engine",
    r"\b[Cc]odes\b": "quantized embeddings",
    r"\b[Dd]esks?\b|\bManner\b|\bGuard\b|\bAsk\b(?=\()": "served gallery, search settings, request, middleware",
    r"\b[Gg]ate[sd]?\b": "parity check",
    r"\b[Mm]irror(s|ed|ing)?\b": "horizontal flip",
    r"(?<!k-)(?<!k_)\breciprocal\b(?! rank)": "k-reciprocal",
    r"\bthe limit is the\b": "bottleneck",
    r"\b[Bb]eside\b": "next to, with, in addition to",
    r"\b[Aa]new\b": "again",
    r"\b[Mm]end(s|ed|ing)?\b": "fix, correct, repair",
}
# Path (a prefix) and what may stand in its lines.
ALLOWED: tuple[tuple[str, str], ...] = (
    # The names of files, tables and keys on disk stay.
    ("runtime/clipret/gallery/", r"codes-|\"codes\"|rows\|codes|mirrored"),
    ("runtime/clipret/indexing/", r"mirrored"),
    ("tests/runtime/gallery/", r"codes-"),
    ("tests/runtime/server/test_hostile.py", r"rows\|codes"),
    ("benchmarks/", r"codes-|\"codes\""),
    ("docs/gallery.md", r"codes-|mirrored"),
    ("tests/", r"exit_codes|returncodes|codes = |codes\)|codes:"),
    ("training/clipret_training/synthetic/", r"mirrors"),  # of a car
    ("export/clipret_export/parity.py", r"\"pictures\""),  # a key of older bundles
    ("runtime/clipret/tables.py", r'"caption": \("caption"'),  # names of columns in files of users
    ("runtime/clipret/inference/tensorrt.py", r"\ban engine\b"),  # all engines of this file are TensorRT's
    ("tests/runtime/inference/test_tensorrt.py", r"text\\\.plan"),  # a file name
)


def lines_at_fault(path: Path) -> list[str]:
    """`path:line: word -> what to say` for each line of a file that has such a word."""
    name = path.relative_to(ROOT).as_posix()
    allowed = [re.compile(pattern) for prefix, pattern in ALLOWED if name.startswith(prefix)]
    faults = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if any(pattern.search(line) for pattern in allowed):
            continue
        for pattern, instead in WORDS.items():
            if match := re.search(pattern, line):
                faults.append(f"{name}:{number}: {match[0]!r}: say {instead}")
    return faults


def main() -> None:
    """Print the faults of the files that are named, or of all."""
    tracked = subprocess.run(
        ["git", "ls-files", "--", *sys.argv[1:]], cwd=ROOT, capture_output=True, text=True, check=True
    )
    files = [ROOT / name for name in tracked.stdout.splitlines() if not name.startswith(LEFT_OUT)]
    faults = [fault for file in files if file.suffix in SUFFIXES and file.exists() for fault in lines_at_fault(file)]
    print("\n".join(faults) if faults else f"{len(files)} files use the glossary's words")
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
