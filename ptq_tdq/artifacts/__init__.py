"""Artifact directories: plain data on disk, checked byte by byte."""

from ptq_tdq.artifacts.artifact import Artifact, IntervalTable, check_artifact, check_base_model
from ptq_tdq.artifacts.card import model_card, public_name
from ptq_tdq.artifacts.component import component_document, component_tensors, decode_component
from ptq_tdq.artifacts.document import CONFIG_FILE, SCHEMA_VERSION, check_draft, schema
from ptq_tdq.artifacts.packing import pack, unpack
from ptq_tdq.artifacts.store import check_output, encode_artifact, read_artifact, write_artifact
from ptq_tdq.artifacts.summary import summarize

__all__ = [
    "CONFIG_FILE",
    "SCHEMA_VERSION",
    "Artifact",
    "IntervalTable",
    "check_artifact",
    "check_base_model",
    "check_draft",
    "check_output",
    "component_document",
    "component_tensors",
    "decode_component",
    "encode_artifact",
    "model_card",
    "pack",
    "public_name",
    "read_artifact",
    "schema",
    "summarize",
    "unpack",
    "write_artifact",
]
