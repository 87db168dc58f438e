"""Downloads the model that the sentiment example trained and classifies the sentences given as arguments.

python classify.py --endpoint http://… --model s3://checkpoints/team-a/sentiment-1a2b3c4d/model "A lovely film."
"""

import argparse
import tempfile
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description="Classify sentences with a trained model.")
    parser.add_argument("--endpoint", help="URL of an S3-compatible store; default: AWS. Credentials: AWS_* as usual")
    parser.add_argument("--model", required=True, help="status.model.uri of the FineTuneJob")
    parser.add_argument("sentences", nargs="+", metavar="sentence")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        download(arguments.model, Path(folder), endpoint=arguments.endpoint)
        for sentence, (label, share) in zip(
            arguments.sentences, classify(Path(folder), arguments.sentences), strict=True
        ):
            print(f"{label} ({share:.0%}): {sentence}")


def download(uri: str, folder: Path, *, endpoint: str | None) -> None:
    import boto3
    from botocore.config import Config

    client = boto3.client(
        "s3", endpoint_url=endpoint, config=Config(s3={"addressing_style": "path"}) if endpoint else None
    )
    bucket, _, prefix = uri.removeprefix("s3://").partition("/")
    for entry in client.list_objects_v2(Bucket=bucket, Prefix=f"{prefix}/").get("Contents", []):
        client.download_file(bucket, entry["Key"], str(folder / entry["Key"].rsplit("/", 1)[-1]))
    if not (folder / "config.json").exists():
        raise SystemExit(f"{uri}: there is no model")


def classify(folder: Path, sentences: list[str]) -> list[tuple[str, float]]:
    """Return for each sentence its label and how sure the model is."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        shares = model(**tokenizer(sentences, padding=True, truncation=True, return_tensors="pt")).logits.softmax(
            dim=-1
        )
    return [(model.config.id2label[int(row.argmax())], float(row.max())) for row in shares]


if __name__ == "__main__":
    main()
