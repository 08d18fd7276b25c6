"""Import the folder of an export into FiftyOne, and print each sample as a line of JSON.

Runs in an environment with `fiftyone` and `mongomock`. FiftyOne keeps datasets in MongoDB: mongomock, which holds them
in memory, stands in for it. What is FiftyOne's own: the importer, the documents and their fields, and the migration.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

os.environ |= {
    "FIFTYONE_DATABASE_URI": "mongodb://localhost",
    "FIFTYONE_DATABASE_VALIDATION": "false",
    "FIFTYONE_DO_NOT_TRACK": "true",
}

import mongoengine
import mongomock
import pymongo

STORE = mongomock.store.ServerStore()


class Client(mongomock.MongoClient):  # type: ignore[misc]
    """A client of the one server in memory."""

    _closed = False

    def __init__(self, *_: Any, **named: Any) -> None:
        for name in ("appname", "compressors", "host"):
            named.pop(name, None)
        super().__init__("mongodb://localhost", _store=STORE)


connect = mongoengine.connect
pymongo.MongoClient = Client
mongoengine.connect = lambda db=None, alias="default", **_: connect(
    db, alias=alias, host="mongodb://localhost", mongo_client_class=Client, uuidRepresentation="standard"
)

import fiftyone as fo  # noqa: E402  # after the client that it is to use

dataset = fo.Dataset.from_dir(sys.argv[1], dataset_type=fo.types.FiftyOneDataset)
print(json.dumps({"classes": dataset.classes, "fields": sorted(dataset.get_field_schema())}))
for sample in dataset:
    found = {name: sample[name] for name in sample.field_names if isinstance(sample[name], (str, int, float, list))}
    print(
        json.dumps(
            {
                **found,
                "id": sample.id,
                "labels": [one.label for one in sample.predictions.classifications],
                "scores": [one.confidence for one in sample.predictions.classifications],
                "bands": [one["band"] for one in sample.predictions.classifications if one.has_attribute("band")],
                "embedding": sample.embedding.tolist(),
                "dtype": str(sample.embedding.dtype),
            }
        )
    )
