"""Judges manifests by the schemas that Kubernetes publishes, and policies by ours.

check.py TOOLS CRDS REFUSED EXAMPLES... -- VERSION... -- MANIFESTS...

TOOLS holds the packages of requirements.txt. Fields that a version does not know are
wrong, as they are to `kubectl apply`.
"""

import json
import pathlib
import sys

TOOLS = pathlib.Path(sys.argv[1])
# Of `cel` the extension alone: the package around it wants what command lines take.
sys.path[:0] = [str(TOOLS / "cel"), str(TOOLS)]

import cel  # noqa: E402
import jsonschema_rs  # noqa: E402
import yaml  # noqa: E402

LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
# The Prometheus operator's own, whose schemas nobody ships: written with care.
NOT_PUBLISHED = {"ServiceMonitor", "PrometheusRule"}
CLUSTER_SCOPED = {"Namespace", "ClusterRole", "ClusterRoleBinding", "CustomResourceDefinition"}
CAPABILITIES = ["BPF", "DAC_READ_SEARCH", "NET_ADMIN", "PERFMON", "SYS_ADMIN", "SYS_PTRACE"]

wrong = []


def split(words):
    parts = [[]]
    for word in words:
        if word == "--":
            parts.append([])
        else:
            parts[-1].append(word)
    return parts


def documents(path):
    text = pathlib.Path(path).read_text()
    return [one for one in yaml.load_all(text, Loader=LOADER) if one is not None]


class Version:
    """The kinds of one version of Kubernetes."""

    def __init__(self, number):
        self.number = number
        directory = TOOLS / "kubernetes_validate/kubernetes-json-schema"
        text = (directory / f"v{number}.0-local-strict/_definitions.json").read_text()
        self.definitions = json.loads(text.replace('"_definitions.json#/', '"#/'))["$defs"]
        self.kinds = {}
        for name, schema in self.definitions.items():
            for of in schema.get("x-kubernetes-group-version-kind", []):
                version = f"{of['group']}/{of['version']}".lstrip("/")
                self.kinds[(version, of["kind"])] = name
        self.validators = {}

    def judge(self, document):
        kind = (document.get("apiVersion"), document.get("kind"))
        if kind[1] in NOT_PUBLISHED:
            return
        name = self.kinds.get(kind)
        if name is None:
            yield f"Kubernetes {self.number} has no {kind[0]} {kind[1]}"
            return
        if name not in self.validators:
            schema = {"$ref": f"#/$defs/{name}", "$defs": self.definitions}
            self.validators[name] = jsonschema_rs.Draft202012Validator(schema)
        for error in self.validators[name].iter_errors(document):
            path = ".".join(str(part) for part in error.instance_path)
            yield f"Kubernetes {self.number}: {path}: {error.message[:200]}"


def strict(schema):
    """A structural schema as `kubectl apply` has it: unknown fields are refused, and a
    field that is null is one that is not there."""
    out = dict(schema)
    if "properties" in schema:
        out["properties"] = {key: strict(value) for key, value in schema["properties"].items()}
        out["additionalProperties"] = False
    elif isinstance(schema.get("additionalProperties"), dict):
        out["additionalProperties"] = strict(schema["additionalProperties"])
    elif schema.get("type") == "object" and not schema.get("x-kubernetes-preserve-unknown-fields"):
        out["additionalProperties"] = False
    if "items" in schema:
        out["items"] = strict(schema["items"])
    return out


class Custom:
    """A kind of our own."""

    def __init__(self, definition):
        version = definition["spec"]["versions"][0]
        schema = version["schema"]["openAPIV3Schema"]
        fields = strict(schema)
        fields["properties"]["metadata"] = {"type": "object"}
        self.fields = jsonschema_rs.Draft202012Validator(fields)
        rules = schema["properties"]["spec"].get("x-kubernetes-validations", [])
        self.rules = [(rule["rule"], rule["message"]) for rule in rules]
        self.broken = set()

    def judge(self, document):
        """What is wrong by its fields, and by rules between them."""
        by_fields = [error.message[:200] for error in self.fields.iter_errors(document)]
        by_rules = []
        for rule, message in self.rules if not by_fields else []:
            if cel.evaluate(rule, {"self": document.get("spec")}) is not True:
                by_rules.append(message)
                self.broken.add(rule)
        return by_fields, by_rules


def policies(crds, refused, examples):
    kinds = {crd["spec"]["names"]["kind"]: Custom(crd) for crd in documents(crds)}
    seen = set()
    for path in examples:
        for document in documents(path):
            kind = kinds.get(document["kind"])
            if kind is None:
                continue
            seen.add(document["kind"])
            for why in sum(kind.judge(document), []):
                wrong.append(f"{path}: {document['metadata']['name']}: {why}")
    for name in kinds.keys() - seen:
        wrong.append(f"no example of {name}")
    for row in documents(refused)[0]:
        document = {
            "apiVersion": "postern.dev/v1alpha1",
            "kind": row["kind"],
            "metadata": {"name": "p", "namespace": "shop"},
        }
        if "spec" in row:
            document["spec"] = row["spec"]
        by_fields, by_rules = kinds[row["kind"]].judge(document)
        by = {"fields": by_fields, "rules": by_rules}
        if not by[row["by"]]:
            wrong.append(f"{refused}: not refused by {row['by']}: {row}")
    for name, kind in kinds.items():
        for rule in {rule for rule, _ in kind.rules} - kind.broken:
            wrong.append(f"{name}: nothing in {refused} breaks the rule {rule}")


def pod(document):
    return document.get("spec", {}).get("template", {})


def sound(path, all_documents):
    """What no schema says."""

    def complain(document, why):
        name = document.get("metadata", {}).get("name")
        wrong.append(f"{path}: {document.get('kind')} {name}: {why}")

    names = set()
    there = {(one["kind"], one["metadata"]["name"]) for one in all_documents}
    for document in all_documents:
        kind, meta = document["kind"], document["metadata"]
        key = (kind, meta.get("namespace"), meta["name"])
        if key in names:
            complain(document, "is there twice")
        names.add(key)
        if (kind in CLUSTER_SCOPED) == ("namespace" in meta):
            complain(document, "namespace")
        if kind.endswith("RoleBinding"):
            role = document["roleRef"]
            if (role["kind"], role["name"]) not in there:
                complain(document, f"there is no {role}")
            for subject in document["subjects"]:
                if (subject["kind"], subject["name"]) not in there:
                    complain(document, f"there is no {subject}")
        for rule in document.get("rules", []):
            everything = [*rule["apiGroups"], *rule["resources"], *rule["verbs"]]
            if "*" in everything or "secrets" in everything:
                complain(document, f"more than is needed: {rule}")
        if kind not in ("DaemonSet", "Deployment"):
            continue
        template = pod(document)
        labels = template["metadata"]["labels"]
        if not document["spec"]["selector"]["matchLabels"].items() <= labels.items():
            complain(document, "selects not its own pods")
        if labels.get("postern.dev/mesh") != "disabled":
            complain(document, "would be in the mesh that it makes")
        spec = template["spec"]
        if ("ServiceAccount", spec["serviceAccountName"]) not in there:
            complain(document, "has no service account")
        volumes = {volume["name"] for volume in spec["volumes"]}
        for volume in spec["volumes"]:
            named = volume.get("configMap", {})
            if named and ("ConfigMap", named["name"]) not in there:
                complain(document, f"there is no ConfigMap {named['name']}")
            source = volume.get("hostPath", {}).get("path", "")
            if source == "/" or "docker" in source or "containerd" in source:
                complain(document, f"mounts {source}")
        mounted = set()
        for container in spec["containers"] + spec.get("initContainers", []):
            mounted |= {mount["name"] for mount in container["volumeMounts"]}
            security = container["securityContext"]
            if security.get("privileged") or not security["readOnlyRootFilesystem"]:
                complain(document, "is privileged, or writes to its image")
            capabilities = security["capabilities"]
            # The guard only writes files.
            bare = kind != "DaemonSet" or container["name"] == "guard"
            wanted = [] if bare else CAPABILITIES
            if capabilities["drop"] != ["ALL"] or sorted(capabilities.get("add", [])) != wanted:
                complain(document, f"capabilities: {capabilities}")
            if kind == "DaemonSet" and container.get("ports"):
                complain(document, "ports of the host keep a second agent from the node")
        if mounted != volumes:
            complain(document, f"volumes and mounts differ: {mounted ^ volumes}")


def documented(path):
    """Every capability stands in the document with its reason."""
    rows = [row for row in pathlib.Path(path).read_text().splitlines() if row.startswith("|")]
    for capability in CAPABILITIES:
        if not any(f"`{capability}`" in row for row in rows):
            wrong.append(f"{path}: no row gives the reason of {capability}")


def main():
    (crds, refused, document, *examples), versions, manifests = split(sys.argv[2:])
    policies(crds, refused, examples)
    documented(document)
    versions = [Version(number) for number in versions]
    checked = 0
    for path in [crds, *manifests]:
        all_documents = documents(path)
        for one in all_documents:
            for version in versions:
                checked += 1
                name = one.get("metadata", {}).get("name")
                wrong.extend(f"{path}: {one.get('kind')} {name}: {why}" for why in version.judge(one))
        if path != crds:
            sound(path, all_documents)
    for line in wrong:
        print(line, file=sys.stderr)
    if wrong:
        sys.exit(f"{len(wrong)} things in the manifests are wrong")
    print(f"manifests: {checked} objects judged")


main()
