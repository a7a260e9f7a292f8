"""``narrowcast serve --render``: files that their own programs accept, and that come back to the command as it was given."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from packaging.requirements import Requirement
from test_serve_cli import artifact

from e2e.command import Cli
from narrowcast._version import __version__
from narrowcast.artifacts.manifest import Manifest, Measurement
from narrowcast.recipes.target import Target
from narrowcast.serving.render import KINDS, quoting

ManifestOf = Callable[..., Manifest]
TOKEN = "never-in-a-file"
KSERVE = Path(__file__).parents[1] / "unit" / "serving" / "data" / "kserve-0.21.0-fields.json"


@pytest.fixture
def models(tmp_path: Path, manifest_of: ManifestOf) -> Path:
    """A folder of two models with an awkward name: one of two threads whose memory was measured, one like it."""
    root = tmp_path / "my models $HOME 100% é 'x' \"y\""
    peak = Measurement(measure="peak_memory", subject="artifact", value=5e7, unit="bytes")
    for name in ("scale", "other"):
        manifest = manifest_of(target=Target(threads=2), measurements=(peak,))
        artifact(root / name / "1" / "artifact", manifest, 2.0)
    return root


@pytest.fixture
def rendered(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """From a kind and a command to the text of its file, printed by a server that has a token."""
    monkeypatch.setenv("NARROWCAST_ADMIN_TOKEN", TOKEN)

    def render(kind: str, *arguments: object) -> str:
        done = cli("serve", *arguments, "--render", kind)
        assert done.code == 0, done.err
        assert TOKEN not in done.out
        return done.out

    return render


GIVEN = ("--workers", "3", "--grace", "12.5", "--grpc-port", "-1", "--max-batch", "16")


# systemd --------------------------------------------------------------------------------------------------------------


def setting(unit: str, name: str) -> list[str]:
    return [line.partition("=")[2] for line in unit.splitlines() if line.startswith(f"{name}=")]


def systemd_words(line: str) -> list[str]:
    """Return the words of a command line as systemd reads them: quotes, then ``%%`` and ``$$``."""
    return [word.replace("%%", "%").replace("$$", "$") for word in shlex.split(line)]


def test_a_unit_holds_the_command_and_ends_the_server_gently(models: Path, rendered: Callable[..., str]) -> None:
    unit = rendered("systemd", models, *GIVEN, "--host", "0.0.0.0")
    (command,) = setting(unit, "ExecStart")
    assert systemd_words(command) == [
        *(sys.executable, "-m", "narrowcast", "serve", str(models), "--host", "0.0.0.0"),
        *("--grpc-port", "-1", "--workers", "3", "--max-batch", "16", "--grace", "12.5"),
    ]
    assert setting(unit, "KillSignal") == ["SIGTERM"]
    assert setting(unit, "TimeoutStopSec") == ["23"]
    assert setting(unit, "EnvironmentFile") == ["/etc/narrowcast/serve.env"]
    assert setting(unit, "CapabilityBoundingSet") == [""]
    low = rendered("systemd", models, "--port", 80)
    assert setting(low, "AmbientCapabilities") == ["CAP_NET_BIND_SERVICE"]


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
def test_systemd_accepts_the_unit_and_finds_it_hardened(
    models: Path, rendered: Callable[..., str], tmp_path: Path
) -> None:
    file = tmp_path / "narrowcast.service"
    file.write_text(rendered("systemd", models, *GIVEN))
    checked = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", "--recursive-errors=no", str(file)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (checked.returncode, checked.stdout, checked.stderr) == (0, "", "")
    scored = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", "--no-pager", str(file)],
        capture_output=True,
        text=True,
        check=False,
    )
    found = re.search(r"exposure level for \S+: ([\d.]+)", scored.stdout)
    assert found, scored.stderr
    assert float(found.group(1)) <= 3.0, scored.stdout


# containers -----------------------------------------------------------------------------------------------------------


def instructions(text: str) -> dict[str, str]:
    lines = re.sub(r"\\\n\s*", "", text).splitlines()
    found = [line.partition(" ") for line in lines if line and not line.startswith("#")]
    assert len({name for name, _, _ in found}) == len(found)
    return {name: value for name, _, value in found}


def test_a_container_file_pins_what_is_installed_and_runs_as_nobody(models: Path, rendered: Callable[..., str]) -> None:
    found = instructions(rendered("containerfile", models, *GIVEN))
    assert found["FROM"] == f"python:{sys.version_info.major}.{sys.version_info.minor}-slim"
    assert found["USER"] == "10001:10001"
    assert found["EXPOSE"] == "8000 8002"
    assert found["STOPSIGNAL"] == "SIGTERM"
    assert json.loads(found["ENTRYPOINT"]) == ["python", "-m", "narrowcast", "serve"]
    assert json.loads(found["CMD"]) == [
        *("/srv/models", "--host", "0.0.0.0", "--grpc-port", "-1", "--workers", "3"),
        *("--max-batch", "16", "--grace", "12.5"),
    ]
    probe = json.loads(found["HEALTHCHECK"].partition(" CMD ")[2])
    assert probe[:2] == ["python", "-c"]
    compile(probe[2], "probe", "exec")
    pins = [Requirement(word) for word in shlex.split(found["RUN"])[5:]]
    assert str(pins[0]) == f"narrowcast[serve]=={__version__}"
    assert {"grpcio", "httptools", "onnxruntime", "orjson", "protobuf", "uvloop"} <= {pin.name for pin in pins}
    assert not {"torch", "pytest", "ray"} & {pin.name for pin in pins}
    assert all(str(pin.specifier).startswith("==") for pin in pins)


def test_an_artifact_for_openvino_brings_it_into_the_image(
    tmp_path: Path, manifest_of: ManifestOf, rendered: Callable[..., str]
) -> None:
    folder = artifact(tmp_path / "net", manifest_of(target=Target(runtime="openvino")), 2.0)
    found = instructions(rendered("containerfile", folder))
    assert f"narrowcast[openvino,serve]=={__version__}" in found["RUN"]
    assert '"openvino==' in found["RUN"]
    assert json.loads(found["CMD"])[0] == "/srv/models/net"


def compose_words(words: list[str]) -> list[str]:
    """Return words as Compose fills their variables in."""
    assert not any(re.search(r"(?<!\$)(\$\$)*\$(?!\$)", word) for word in words)
    return [word.replace("$$", "$") for word in words]


def test_a_compose_file_publishes_where_the_command_listens(models: Path, rendered: Callable[..., str]) -> None:
    service = yaml.safe_load(rendered("compose", models, *GIVEN))["services"]["narrowcast"]
    assert compose_words(service["command"])[:3] == ["/srv/models", "--host", "0.0.0.0"]
    assert [(port["host_ip"], port["target"], port["published"]) for port in service["ports"]] == [
        ("127.0.0.1", 8000, "8000"),
        ("127.0.0.1", 8002, "8002"),
    ]
    (volume,) = service["volumes"]
    assert compose_words([volume["source"]]) == [str(models)]
    assert (volume["target"], volume["read_only"]) == ("/srv/models", True)
    assert service["stop_grace_period"] == "23s"
    assert service["environment"]["NARROWCAST_ADMIN_TOKEN"].startswith("${NARROWCAST_ADMIN_TOKEN:?")


def test_compose_files_follow_the_schema_of_compose(models: Path, rendered: Callable[..., str]) -> None:
    pytest.importorskip("check_jsonschema", reason="check-jsonschema, which has the schema, is not installed")
    place = resources.files("check_jsonschema") / "builtin_schemas" / "vendor" / "compose-spec.json"
    schema = json.loads(place.read_text(encoding="utf-8"))
    document = yaml.safe_load(rendered("compose", models, *GIVEN))
    jsonschema.validate(document, schema)
    document["services"]["narrowcast"]["port"] = 1
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(document, schema)


def test_several_places_are_mounted_by_their_names(
    tmp_path: Path, manifest_of: ManifestOf, rendered: Callable[..., str]
) -> None:
    one = artifact(tmp_path / "net", manifest_of(), 2.0)
    for folder in ("a", "b"):
        artifact(tmp_path / folder / "zoo" / f"of-{folder}" / "1" / "artifact", manifest_of(), 2.0)
    places = (one, tmp_path / "a" / "zoo", tmp_path / "b" / "zoo")
    service = yaml.safe_load(rendered("compose", *places))["services"]["narrowcast"]
    targets = ["/srv/models/net", "/srv/models/zoo", "/srv/models/zoo-2"]
    assert service["command"][:3] == targets
    assert [volume["source"] for volume in service["volumes"]] == [str(place) for place in places]
    assert [volume["target"] for volume in service["volumes"]] == targets


# clusters -------------------------------------------------------------------------------------------------------------


def test_kubernetes_accepts_the_manifest_which_follows_the_command(models: Path, rendered: Callable[..., str]) -> None:
    deployment, service = yaml.safe_load_all(rendered("kubernetes", models, *GIVEN))
    for document in (deployment, service):
        kubernetes_validate.validate(document, "1.31", strict=True)
    pod = deployment["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["args"][:3] == ["/srv/models", "--host", "0.0.0.0"]
    assert container["readinessProbe"]["httpGet"]["path"] == "/v2/health/ready"
    assert container["livenessProbe"]["httpGet"]["path"] == "/v2/health/live"
    assert container["resources"]["requests"] == {"cpu": "12", "memory": str(6 * 50_000_000)}
    assert container["env"][0]["valueFrom"]["secretKeyRef"] == {"name": "narrowcast-admin", "key": "token"}
    assert pod["terminationGracePeriodSeconds"] == 28
    assert [port["name"] for port in service["spec"]["ports"]] == ["http", "metrics"]
    assert service["spec"]["selector"] == deployment["spec"]["template"]["metadata"]["labels"]


def kubernetes_words(words: list[str]) -> list[str]:
    """Return arguments as Kubernetes passes them on: ``$$`` is a dollar, ``$(NAME)`` a variable of the container."""

    def read(match: re.Match[str]) -> str:
        return "$" if match[0] == "$$" else f"<{match[1]}>"

    return [re.sub(r"\$\$|\$\((.*?)\)", read, word) for word in words]


@pytest.mark.parametrize("kind", ["kubernetes", "kserve"])
def test_dollars_in_names_mean_nothing_to_kubernetes(
    kind: str, tmp_path: Path, manifest_of: ManifestOf, rendered: Callable[..., str]
) -> None:
    names = ("a$$b", "$(NARROWCAST_ADMIN_TOKEN)", "$$(NARROWCAST_ADMIN_TOKEN)", "c$d", "$$")
    places = [tmp_path / name for name in names]
    for number, place in enumerate(places):
        artifact(place / f"net-{number}" / "1" / "artifact", manifest_of(), 2.0)
    first = next(yaml.safe_load_all(rendered(kind, *places)))
    containers = (
        first["spec"]["template"]["spec"]["containers"] if kind == "kubernetes" else first["spec"]["containers"]
    )
    words = kubernetes_words(containers[0]["args"])
    assert [word.rpartition("/")[2] for word in words[: len(names)]] == list(names)


def test_a_model_with_workers_of_its_own_is_counted_with_them(models: Path, rendered: Callable[..., str]) -> None:
    (models / "other" / "serving.json").write_text('{"workers": 1}')
    deployment, _ = yaml.safe_load_all(rendered("kubernetes", models, *GIVEN))
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    assert container["resources"]["requests"] == {"cpu": "8", "memory": str(4 * 50_000_000)}


def test_memory_that_was_not_measured_is_not_asked_for(
    tmp_path: Path, manifest_of: ManifestOf, rendered: Callable[..., str]
) -> None:
    folder = artifact(tmp_path / "net", manifest_of(), 2.0)
    deployment, _ = yaml.safe_load_all(rendered("kubernetes", folder))
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    assert container["resources"]["requests"] == {"cpu": "1"}


def check_fields(value: Any, kind: str, classes: dict[str, Any]) -> list[tuple[str, Any]]:
    """Check a value of KServe's types field by field, and return what is of Kubernetes' own types."""
    simple = {"str": str, "int": int, "bool": bool}
    if kind.startswith("list["):
        assert isinstance(value, list)
        return [found for item in value for found in check_fields(item, kind[5:-1], classes)]
    if kind in simple:
        assert type(value) is simple[kind]
        return []
    if kind == "dict(str, str)":
        assert all(type(item) is str for pair in value.items() for item in pair)
        return []
    if kind not in classes:
        return [(kind, value)]
    fields = classes[kind]["fields"]
    assert not value.keys() - fields.keys()
    assert not set(classes[kind]["required"]) - value.keys()
    return [found for name, item in value.items() for found in check_fields(item, fields[name], classes)]


def test_kserve_knows_every_field_of_its_manifest(models: Path, rendered: Callable[..., str]) -> None:
    classes = json.loads(KSERVE.read_text(encoding="utf-8"))["classes"]
    runtime, service = yaml.safe_load_all(rendered("kserve", models, *GIVEN))
    assert (runtime["apiVersion"], runtime["kind"]) == ("serving.kserve.io/v1alpha1", "ServingRuntime")
    assert (service["apiVersion"], service["kind"]) == ("serving.kserve.io/v1beta1", "InferenceService")
    kubernetes = check_fields(runtime, "V1alpha1ServingRuntime", classes)
    kubernetes += check_fields(service, "V1beta1InferenceService", classes)
    assert {kind for kind, _ in kubernetes} == {"V1ObjectMeta", "V1Container"}
    (container,) = (value for kind, value in kubernetes if kind == "V1Container")
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": {"containers": [container]}}
    kubernetes_validate.validate(pod, "1.31", strict=True)
    assert container["args"][0] == "/mnt/models"
    model = service["spec"]["predictor"]["model"]
    assert model["protocolVersion"] in runtime["spec"]["protocolVersions"]
    assert model["modelFormat"]["name"] == runtime["spec"]["supportedModelFormats"][0]["name"]
    assert model["runtime"] == runtime["metadata"]["name"]


# what all have in common ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_files_are_the_same_every_time_and_are_written_once(
    kind: str, models: Path, cli: Cli, rendered: Callable[..., str], tmp_path: Path
) -> None:
    text = rendered(kind, models)
    assert rendered(kind, models) == text
    written = cli("serve", models, "--render", kind, "--render-to", tmp_path, "--json")
    said = json.loads(written.out)
    assert said == {"file": str(tmp_path / KINDS[kind].file), "text": text}
    assert Path(said["file"]).read_text(encoding="utf-8") == text
    again = cli("serve", models, "--render", kind, "--render-to", tmp_path)
    assert again.code == 2
    assert "already exists" in again.words


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_a_server_without_a_token_asks_for_none(
    kind: str, models: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NARROWCAST_ADMIN_TOKEN", raising=False)
    done = cli("serve", models, "--render", kind)
    assert done.code == 0
    assert "TOKEN" not in done.out
    assert "://" not in done.out.replace("http://127.0.0.1", "").replace("pvc://narrowcast-models", "")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["{models}", "--render", "kubernets"], "nothing can be rendered for 'kubernets'"),
        (["missing", "--render", "systemd"], "is no folder"),
        (["{models}", "--render", "compose", "--port", "0"], "cannot be deployed"),
        (["{models}", "--render", "compose", "--host", "example"], "host 'example' is no address"),
        (["{models}", "--render", "kubernetes", "--shared-memory"], "a container has a memory of its own"),
        (["{models}", "--render", "systemd", "--render-to", "{models}/no"], "no such folder"),
    ],
)
def test_mistakes_about_rendering_are_answered_in_words(
    models: Path, cli: Cli, arguments: list[str], said: str
) -> None:
    done = cli("serve", *(part.replace("{models}", str(models)) for part in arguments))
    assert done.code == 2
    assert said in done.words


AWKWARD = [
    "",
    " ",
    "a b",
    "$HOME",
    "$$",
    "%n",
    '"',
    "'",
    "\\",
    "\\n",
    "é",
    "日本",
    "#",
    ": ",
    "- x",
    ";",
    "{{ x }}",
    "~",
]


@pytest.mark.parametrize("word", AWKWARD)
def test_awkward_words_come_back(word: str) -> None:
    assert yaml.safe_load(quoting.yaml_word(word)) == word
    assert compose_words([yaml.safe_load(quoting.compose_word(word))]) == [word]
    assert json.loads(quoting.json_words([word])) == [word]
    line = quoting.systemd_command(["/bin/true", word])
    assert systemd_words(line) == ["/bin/true", word]


def test_words_that_do_not_print_are_refused(models: Path, cli: Cli) -> None:
    place = models.rename(models.with_name("two\nlines"))
    for kind in ("systemd", "compose", "kubernetes"):
        done = cli("serve", place, "--render", kind)
        assert done.code == 2
        assert "do not print" in done.words
