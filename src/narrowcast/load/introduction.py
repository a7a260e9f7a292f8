"""What a server says about itself and a model, before any load."""

from __future__ import annotations

import http.client
import importlib
import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast
from urllib.parse import quote

from narrowcast.errors import DataError, ModelError, RuntimeMissingError, UserError, choices
from narrowcast.load.target import Target
from narrowcast.load.tls import check_handshake, tls_error

__all__ = ["Introduction", "TensorSpec", "introduce", "try_once"]

#: Seconds that a server has for each question.
_PATIENCE = 30.0
_START = "start it, or name another URL"
#: Statuses that mean that somebody is not let in: of HTTP, and the names of gRPC's.
_CLOSED = (401, 403, "UNAUTHENTICATED", "PERMISSION_DENIED")


@dataclass(frozen=True)
class TensorSpec:
    """An input as the model's metadata give it; -1 is an axis of any length."""

    name: str
    datatype: str
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.name} {self.datatype}[{','.join(map(str, self.shape))}]"


@dataclass(frozen=True)
class Introduction:
    """A server and one of its models.

    Attributes:
        server: Name of the server.
        version: Its version.
        extensions: Of the protocol that it offers.
        model: Name of the model.
        model_version: The version that is asked for; empty where the server chooses.
        platform: What the model is made for.
        inputs: Its inputs.
        largest_batch: Rows that it takes together; 0 where it has no batch axis, None where the server does not say.
    """

    server: str
    version: str
    extensions: tuple[str, ...]
    model: str
    model_version: str
    platform: str
    inputs: tuple[TensorSpec, ...]
    largest_batch: int | None


def introduce(target: Target, model: str, version: str) -> Introduction:
    """Ask a server who it is, and what a model takes.

    Raises:
        UserError: Nobody answers, or somebody who does not speak the protocol.
        ModelError: The server has no such model, or it is not ready.
    """
    if target.secured:
        check_handshake(target)
    asker = _asker(target)
    server = asker.server()
    metadata = asker.metadata(model, version)
    if metadata is None:
        known = asker.names()
        raise ModelError(
            f"the server at {target} has no model {model!r}{f' in version {version}' if version else ''} that is ready",
            allowed=choices(model, known) if known else "",
        )
    return Introduction(
        server=str(server.get("name", "")),
        version=str(server.get("version", "")),
        extensions=tuple(map(str, server.get("extensions", ()))),
        model=model,
        model_version=version,
        platform=str(metadata.get("platform", "")),
        inputs=tuple(
            TensorSpec(one["name"], one["datatype"], tuple(map(int, one["shape"]))) for one in metadata["inputs"]
        ),
        largest_batch=asker.largest_batch(model, version),
    )


def try_once(target: Target, path: str, payload: bytes, inputs: Sequence[TensorSpec]) -> None:
    """Send one request and look at the answer, so that a load is not spent on requests that are refused.

    Args:
        target: The server.
        path: Method of the request over gRPC.
        payload: The whole request.
        inputs: Of the model, for messages.

    Raises:
        UserError: The connection ends without an answer.
        DataError: The server refuses the request.
    """
    status, words = _asker(target).send(path, payload)
    if status != 0:
        raise DataError(
            f"the server refuses the first request ({status}): {words}", allowed=", ".join(map(str, inputs))
        )


class _Asker(ABC):
    """Questions to a server over one of the protocols."""

    def __init__(self, target: Target) -> None:
        self.target = target

    @abstractmethod
    def server(self) -> dict[str, Any]: ...

    @abstractmethod
    def metadata(self, model: str, version: str) -> dict[str, Any] | None: ...

    @abstractmethod
    def largest_batch(self, model: str, version: str) -> int | None: ...

    @abstractmethod
    def names(self) -> list[str]: ...

    @abstractmethod
    def send(self, path: str, payload: bytes) -> tuple[int, str]:
        """Return 0 where the answer is good, else its status and what it says."""

    def unreachable(self, why: object) -> UserError:
        return UserError(f"nobody answers at {self.target}: {why}", next_step=_START)

    def broken(self, error: OSError) -> UserError:
        if self.target.secured:
            return tls_error(self.target, error)
        if isinstance(error, ConnectionError) and not isinstance(error, ConnectionRefusedError):
            return UserError(
                f"what answers at {self.target} ended the connection: {error.strerror or error}",
                next_step=f"check scheme and port; over TLS, say {self.target.scheme}s://",
            )
        return self.unreachable(error.strerror or error)

    def check_entry(self, status: int | str) -> None:
        """Make sure that a status does not mean that one is not let in.

        Raises:
            UserError: It does.
        """
        if status in _CLOSED:
            raise UserError(
                f"the server at {self.target} lets nobody in without a proof, or not with this one ({status})",
                next_step='send one: --header "Authorization: Bearer ..."; a file keeps it from others: --header @FILE',
            )

    def stranger(self) -> UserError:
        return UserError(
            f"what answers at {self.target} does not speak the Open Inference Protocol, version 2",
            allowed="a server such as narrowcast serve, Triton, KServe or MLServer",
            next_step="check scheme and port"
            if self.target.grpc
            else "check scheme, port and path: PATH/v2 has to answer",
        )


class _HttpAsker(_Asker):
    def server(self) -> dict[str, Any]:
        status, document = self._ask("GET", "/v2")
        self.check_entry(status)
        if status != 200 or not isinstance(document, dict) or "name" not in document:
            raise self.stranger()
        return cast(dict[str, Any], document)

    def metadata(self, model: str, version: str) -> dict[str, Any] | None:
        status, document = self._ask("GET", _model_path(model, version))
        self.check_entry(status)
        if status != 200:
            return None
        if not isinstance(document, dict) or not isinstance(cast(dict[str, Any], document).get("inputs"), list):
            raise self.stranger()
        return cast(dict[str, Any], document)

    def largest_batch(self, model: str, version: str) -> int | None:
        status, document = self._ask("GET", _model_path(model, version) + "/config")
        known = status == 200 and isinstance(document, dict) and "max_batch_size" in document
        return int(cast(dict[str, Any], document)["max_batch_size"]) if known else None

    def names(self) -> list[str]:
        status, document = self._ask("POST", "/v2/repository/index")
        if status != 200 or not isinstance(document, list):
            return []
        return sorted({str(one["name"]) for one in cast(list[dict[str, Any]], document) if "name" in one})

    def send(self, path: str, payload: bytes) -> tuple[int, str]:
        connection = self._connection()
        try:
            connection.connect()
            connection.sock.sendall(payload)
            response = http.client.HTTPResponse(connection.sock, method="POST")
            response.begin()
            body = response.read()
        except (OSError, http.client.HTTPException) as error:
            raise self.unreachable(error) from error
        finally:
            connection.close()
        if response.status == 200:
            return 0, ""
        self.check_entry(response.status)
        return response.status, self.target.access.hide(_error_of(body))

    def _ask(self, method: str, path: str) -> tuple[int, Any]:
        connection = self._connection()
        try:
            headers = {"Host": self.target.name, **dict(self.target.access.others)}
            connection.request(method, self.target.prefix + path, headers=headers)
            response = connection.getresponse()
            body = response.read()
        except OSError as error:
            raise self.broken(error) from error
        except http.client.HTTPException as error:
            raise self.stranger() from error
        finally:
            connection.close()
        try:
            return response.status, json.loads(body) if body else None
        except ValueError:
            return response.status, None

    def _connection(self) -> http.client.HTTPConnection:
        where = self.target.host, self.target.port
        if self.target.secured:
            return http.client.HTTPSConnection(*where, timeout=_PATIENCE, context=self.target.access.context())
        return http.client.HTTPConnection(*where, timeout=_PATIENCE)


class _GrpcAsker(_Asker):
    def __init__(self, target: Target) -> None:
        super().__init__(target)
        try:
            self._grpc: Any = importlib.import_module("grpc")
            self._messages: Any = importlib.import_module("narrowcast.oip.messages").INFERENCE
            self._open: Any = importlib.import_module("narrowcast.load.channels").grpc_channel
        except ImportError as error:
            raise RuntimeMissingError(
                f"load over gRPC needs {error.name}, which is not installed",
                next_step="pip install 'narrowcast[serve]'",
            ) from error

    def server(self) -> dict[str, Any]:
        found, code = self._ask("ServerMetadata")
        if found is None:
            self.check_entry(code)
            raise self.unreachable("no connection") if code in ("UNAVAILABLE", "DEADLINE_EXCEEDED") else self.stranger()
        return {"name": found.name, "version": found.version, "extensions": list(found.extensions)}

    def metadata(self, model: str, version: str) -> dict[str, Any] | None:
        found, code = self._ask("ModelMetadata", name=model, version=version)
        if found is None:
            self.check_entry(code)
            return None
        inputs = [{"name": one.name, "datatype": one.datatype, "shape": list(one.shape)} for one in found.inputs]
        return {"platform": found.platform, "inputs": inputs}

    def largest_batch(self, model: str, version: str) -> int | None:
        found, _ = self._ask("ModelConfig", name=model, version=version)
        return None if found is None else found.config.max_batch_size

    def names(self) -> list[str]:
        found, _ = self._ask("RepositoryIndex")
        return [] if found is None else sorted({one.name for one in found.models})

    def send(self, path: str, payload: bytes) -> tuple[int, str]:
        with self._channel() as channel:
            try:
                channel.unary_unary(path)(payload, timeout=_PATIENCE, metadata=self.target.metadata)
            except self._grpc.RpcError as error:
                if error.code().name == "UNAVAILABLE" and not error.details():
                    raise self.unreachable("no connection") from error
                self.check_entry(error.code().name)
                return error.code().value[0], self.target.access.hide(error.details())
        return 0, ""

    def _ask(self, method: str, **fields: str) -> tuple[Any, str]:
        with self._channel() as channel:
            call = channel.unary_unary(
                f"/inference.GRPCInferenceService/{method}",
                request_serializer=lambda message: message.SerializeToString(),
                response_deserializer=self._messages[f"{method}Response"].FromString,
            )
            try:
                return call(
                    self._messages[f"{method}Request"](**fields), timeout=_PATIENCE, metadata=self.target.metadata
                ), ""
            except self._grpc.RpcError as error:
                return None, error.code().name

    def _channel(self) -> Any:
        return self._open(self.target, asynchronous=False)


def _asker(target: Target) -> _Asker:
    return (_GrpcAsker if target.grpc else _HttpAsker)(target)


def _model_path(model: str, version: str) -> str:
    return f"/v2/models/{quote(model, safe='')}" + (f"/versions/{quote(version, safe='')}" if version else "")


def _error_of(body: bytes) -> str:
    try:
        document = json.loads(body)
    except ValueError:
        document = None
    if isinstance(document, dict):
        for key in ("error", "detail"):
            if key in document:
                return str(cast(dict[str, Any], document)[key])
    return body[:200].decode(errors="replace")
