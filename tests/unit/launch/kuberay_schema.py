"""A schema of the KubeRay and Kubernetes fields that the manifests use, WRITTEN BY HAND: it is not the operator's own.

Names, types and enumerations are from KubeRay's CRD API reference, v1.7.0 (docs/reference/api.md of
ray-project/kuberay, commit 97509c3a7216cf3440af381646560a1885afb53b; `authOptions.secretName` is in v1.6.2's too), and
for pods, claims and ConfigMaps from the Kubernetes API reference, v1.28. A field that is not here is refused, also
where Kubernetes has it: so that a misspelt one is, and whoever uses a new one looks it up.
"""

from __future__ import annotations

from typing import Any

__all__ = ["CONFIG_MAP", "POD_MONITOR", "RAY_CLUSTER", "RAY_JOB", "VOLUME_CLAIM"]

STRING = {"type": "string", "minLength": 1}
STRINGS = {"type": "object", "additionalProperties": {"type": "string"}}
BOOLEAN = {"type": "boolean"}
COUNT = {"type": "integer", "minimum": 0}
LABEL = {"type": "string", "pattern": "^[a-z]([-a-z0-9]*[a-z0-9])?$", "maxLength": 63}
QUANTITY = {"type": "string", "pattern": "^[0-9]+(m|Mi|Gi|Ti)?$"}


def fields(required: tuple[str, ...] = (), **properties: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {name.rstrip("_"): schema for name, schema in properties.items()},
        "required": list(required),
        "additionalProperties": False,
    }


def items(schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": schema, "minItems": 1}


def kind(api_version: str, name: str, required: tuple[str, ...], **properties: Any) -> dict[str, Any]:
    return fields(
        ("apiVersion", "kind", "metadata", *required),
        apiVersion={"const": api_version},
        kind={"const": name},
        metadata=fields(("name", "namespace"), name=LABEL, namespace=LABEL),
        **properties,
    )


# Kubernetes: core/v1.
QUANTITIES = {"type": "object", "additionalProperties": QUANTITY}
RESOURCES = fields(("requests", "limits"), requests=QUANTITIES, limits=QUANTITIES)
CONTAINER_SECURITY = fields(
    ("allowPrivilegeEscalation", "capabilities"),
    allowPrivilegeEscalation={"const": False},
    capabilities=fields(("drop",), drop={"const": ["ALL"]}),
)
POD_SECURITY = fields(
    ("runAsNonRoot", "runAsUser", "seccompProfile"),
    runAsNonRoot={"const": True},
    runAsUser={"type": "integer", "minimum": 1},
    runAsGroup=COUNT,
    fsGroup=COUNT,
    fsGroupChangePolicy={"enum": ["OnRootMismatch", "Always"]},
    seccompProfile=fields(("type",), type={"enum": ["RuntimeDefault", "Localhost", "Unconfined"]}),
)
CONTAINER = fields(
    ("name", "image", "resources", "securityContext"),
    name=LABEL,
    image=STRING,
    env=items(fields(("name", "value"), name=STRING, value={"type": "string"})),
    envFrom=items(fields(("secretRef",), secretRef=fields(("name",), name=LABEL, optional=BOOLEAN))),
    ports=items(fields(("containerPort",), containerPort={"type": "integer", "maximum": 65535}, name=LABEL)),
    resources=RESOURCES,
    securityContext=CONTAINER_SECURITY,
    volumeMounts=items(fields(("name", "mountPath"), name=LABEL, mountPath=STRING, readOnly=BOOLEAN)),
)
VOLUME = fields(
    ("name",),
    name=LABEL,
    persistentVolumeClaim=fields(("claimName",), claimName=LABEL),
    emptyDir=fields(medium={"const": "Memory"}, sizeLimit=QUANTITY),
    configMap=fields(("name",), name=LABEL),
)
POD_TEMPLATE = fields(
    ("spec",),
    spec=fields(
        ("containers", "securityContext"),
        restartPolicy={"enum": ["Always", "OnFailure", "Never"]},
        automountServiceAccountToken=BOOLEAN,
        imagePullSecrets=items(fields(("name",), name=LABEL)),
        nodeSelector=STRINGS,
        tolerations=items(
            fields(
                key=STRING,
                operator={"enum": ["Exists", "Equal"]},
                effect={"enum": ["NoSchedule", "PreferNoSchedule", "NoExecute"]},
            )
        ),
        securityContext=POD_SECURITY,
        containers=items(CONTAINER),
        volumes=items(VOLUME),
    ),
)

# KubeRay: ray.io/v1.
CLUSTER_SPEC = fields(
    ("rayVersion", "authOptions", "headGroupSpec", "workerGroupSpecs"),
    rayVersion={"type": "string", "pattern": r"^2\.[0-9]+\.[0-9]+$"},
    authOptions=fields(("mode", "secretName"), mode={"enum": ["token", "disabled"]}, secretName=LABEL),
    enableInTreeAutoscaling=BOOLEAN,
    autoscalerOptions=fields(
        version={"enum": ["v1", "v2"]},
        idleTimeoutSeconds=COUNT,
        securityContext=CONTAINER_SECURITY,
    ),
    headGroupSpec=fields(
        ("rayStartParams", "template"),
        serviceType={"enum": ["ClusterIP", "NodePort", "LoadBalancer", "ExternalName"]},
        rayStartParams=STRINGS,
        template=POD_TEMPLATE,
    ),
    workerGroupSpecs=items(
        fields(
            ("groupName", "minReplicas", "maxReplicas", "rayStartParams", "template"),
            groupName=LABEL,
            replicas=COUNT,
            minReplicas=COUNT,
            maxReplicas={"type": "integer", "minimum": 1},
            rayStartParams=STRINGS,
            template=POD_TEMPLATE,
        )
    ),
)
RAY_CLUSTER = kind("ray.io/v1", "RayCluster", ("spec",), spec=CLUSTER_SPEC)
RAY_JOB = kind(
    "ray.io/v1",
    "RayJob",
    ("spec",),
    spec=fields(
        ("entrypoint", "rayClusterSpec"),
        entrypoint=STRING,
        submissionMode={"enum": ["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"]},
        backoffLimit=COUNT,
        shutdownAfterJobFinishes=BOOLEAN,
        ttlSecondsAfterFinished=COUNT,
        submitterPodTemplate=POD_TEMPLATE,
        rayClusterSpec=CLUSTER_SPEC,
    ),
)
VOLUME_CLAIM = kind(
    "v1",
    "PersistentVolumeClaim",
    ("spec",),
    spec=fields(
        ("accessModes", "resources"),
        accessModes={"const": ["ReadWriteMany"]},
        storageClassName=STRING,
        resources=fields(("requests",), requests=fields(("storage",), storage=QUANTITY)),
    ),
)
CONFIG_MAP = kind("v1", "ConfigMap", ("data",), data=STRINGS)
# Prometheus operator: monitoring.coreos.com/v1, as KubeRay's own config/prometheus/podMonitor.yaml uses it.
POD_MONITOR = kind(
    "monitoring.coreos.com/v1",
    "PodMonitor",
    ("spec",),
    spec=fields(
        ("selector", "podMetricsEndpoints"),
        selector=fields(("matchLabels",), matchLabels=STRINGS),
        podMetricsEndpoints=items(
            fields(
                ("port",),
                port=LABEL,
                interval={"type": "string", "pattern": "^[0-9]+s$"},
                relabelings=items(fields(sourceLabels=items(STRING), targetLabel=STRING)),
            )
        ),
    ),
)
