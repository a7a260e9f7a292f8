"""Protocol buffer messages from tables, in a pool of their own.

Clients bring generated stubs of the same messages; in one process, two files that define the same names in the default
pool would clash. A table is also all there is to generate: no compiler runs when the package is built.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

__all__ = ["Schema"]

_Field = descriptor_pb2.FieldDescriptorProto
_SCALARS = {
    "bool": _Field.TYPE_BOOL,
    "bytes": _Field.TYPE_BYTES,
    "double": _Field.TYPE_DOUBLE,
    "float": _Field.TYPE_FLOAT,
    "int32": _Field.TYPE_INT32,
    "int64": _Field.TYPE_INT64,
    "string": _Field.TYPE_STRING,
    "uint32": _Field.TYPE_UINT32,
    "uint64": _Field.TYPE_UINT64,
}
#: ``name:type=number``; ``*`` before the name repeats it, ``%`` makes it a map from strings, ``|`` puts it into the oneof.
_FIELD = re.compile(r"(?P<kind>[*%|]?)(?P<name>\w+):(?P<type>[\w.]+)=(?P<number>\d+)")


class Schema:
    """The messages of one package.

    Args:
        package: Its name.
        messages: Fields by message; the name of a nested message follows that of its owner and a dot.
        enums: Values by enumeration, from 0 in order; nested like messages.
    """

    def __init__(self, package: str, messages: Mapping[str, str], enums: Mapping[str, tuple[str, ...]]) -> None:
        self._package = package
        self._enums = enums
        file = descriptor_pb2.FileDescriptorProto(name=f"narrowcast/{package}.proto", package=package, syntax="proto3")
        owners: dict[str, Any] = {}
        for name, fields in messages.items():
            owner, _, own = name.rpartition(".")
            message = owners[owner].nested_type.add(name=own) if owner else file.message_type.add(name=own)
            owners[name] = message
            for text in fields.split():
                self._add_field(message, f".{package}.{name}", text)
        for name, values in enums.items():
            owner, _, own = name.rpartition(".")
            enum = owners[owner].enum_type.add(name=own) if owner else file.enum_type.add(name=own)
            for number, value in enumerate(values):
                enum.value.add(name=value, number=number)
        pool = descriptor_pool.DescriptorPool()
        pool.Add(file)
        self._classes = {
            name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{package}.{name}")) for name in messages
        }

    def __getitem__(self, name: str) -> Any:
        """Return the class of a message."""
        return self._classes[name]

    def _add_field(self, message: Any, full_name: str, text: str) -> None:
        match = _FIELD.fullmatch(text)
        if match is None:
            raise ValueError(f"field {text!r} of {full_name} is none")
        kind, name, type_, number = match.groups()
        field = message.field.add(name=name, number=int(number), label=_Field.LABEL_OPTIONAL)
        if kind == "%":
            entry = message.nested_type.add(name=name.title().replace("_", "") + "Entry")
            entry.options.map_entry = True
            self._add_field(entry, full_name, "key:string=1")
            self._add_field(entry, full_name, f"value:{type_}=2")
            field.type, field.type_name = _Field.TYPE_MESSAGE, f"{full_name}.{entry.name}"
        elif type_ in _SCALARS:
            field.type = _SCALARS[type_]
        else:
            field.type = _Field.TYPE_ENUM if type_ in self._enums else _Field.TYPE_MESSAGE
            field.type_name = f".{self._package}.{type_}"
        if kind in ("*", "%"):
            field.label = _Field.LABEL_REPEATED
        if kind == "|":
            if not message.oneof_decl:
                message.oneof_decl.add(name="choice")
            field.oneof_index = 0
