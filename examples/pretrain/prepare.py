"""Puts the pretraining example's model and text into S3: a small decoder without weights, and the sources of Python's standard library.

The text is on every machine that has Python, and is of one kind, so that a small model learns something visible in minutes: the
indentation, the keywords, the names. One record per file; every tenth file is held out for evaluation.
"""

import argparse
import json
import random
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

VOCABULARY = 4096
MAX_TOKENS = 256
EVALUATION_EVERY = 10
SEED = 1
# Tests are half of the library and repeat themselves; generated tables teach nothing.
LEFT_OUT = ("test", "tests", "idlelib", "lib2to3", "encodings", "site-packages", "__pycache__", "pydoc_data")


def main() -> None:
    arguments = parse_arguments()
    texts = list(read_sources(Path(sysconfig.get_paths()["stdlib"])))
    random.Random(SEED).shuffle(texts)
    evaluation, train = texts[::EVALUATION_EVERY], [t for i, t in enumerate(texts) if i % EVALUATION_EVERY]
    print(
        f"{len(train)} files to train on ({sum(map(len, train)):,} characters), {len(evaluation)} held out", flush=True
    )
    files = {
        f"{arguments.data}/train.jsonl": as_jsonl(train),
        f"{arguments.data}/evaluation.jsonl": as_jsonl(evaluation),
    }
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder), train)
        files |= {f"{arguments.model}/{path.name}": path.read_bytes() for path in Path(folder).iterdir()}
    upload(files, storage=arguments.storage, endpoint=arguments.endpoint)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Upload the model and the text of the pretraining example.")
    parser.add_argument("--endpoint", help="URL of an S3-compatible store; default: AWS. Credentials: AWS_* as usual")
    parser.add_argument(
        "--model", default="s3://models/python-writer", help="where the model goes (default: %(default)s)"
    )
    parser.add_argument("--data", default="s3://datasets/python", help="where the text goes (default: %(default)s)")
    parser.add_argument("--storage", default="s3://checkpoints", help="bucket for checkpoints (default: %(default)s)")
    return parser.parse_args()


def read_sources(folder: Path) -> Iterator[str]:
    """Yield the text of each module."""
    for path in sorted(folder.rglob("*.py")):
        if not any(part in LEFT_OUT for part in path.relative_to(folder).parts):
            text = path.read_bytes().decode(errors="ignore")
            if text.strip():
                yield text


def write_model(folder: Path, texts: list[str]) -> None:
    """Write configuration and tokenizer of a decoder of 4.2 million weights; the job draws the weights themselves."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(folder)
    LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=MAX_TOKENS,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.token_to_id("<eos>"),
        architectures=["LlamaForCausalLM"],
    ).save_pretrained(folder)


def as_jsonl(texts: list[str]) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


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
