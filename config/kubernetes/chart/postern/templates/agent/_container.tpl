{{/* The agent's container, whatever it does: both need the same of the node. */}}
{{- define "postern.agentContainer" -}}
{{- $root := .root -}}
image: {{ include "postern.image" $root }}
imagePullPolicy: {{ $root.Values.image.pullPolicy }}
args: {{ toJson .args }}
env:
  - name: NODE_NAME
    valueFrom:
      fieldRef: {apiVersion: v1, fieldPath: spec.nodeName}
resources:
  {{- toYaml $root.Values.agent.resources | nindent 2 }}
securityContext:
  privileged: false
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  runAsUser: 0
  runAsGroup: 0
  capabilities:
    drop: [ALL]
    add:
      # Kernel programs and maps.
      - BPF
      # Programs of network hooks; sockets with addresses of others.
      - NET_ADMIN
      # Programs that trace.
      - PERFMON
      # Network namespaces of pods; bpffs.
      - SYS_ADMIN
      # Which namespace and executable a process has.
      - SYS_PTRACE
      # Tokens of pods that OutboundToken exchanges.
      - DAC_READ_SEARCH
volumeMounts:
  - {name: config, mountPath: /etc/postern/agent, readOnly: true}
  - {name: state, mountPath: /var/lib/postern}
  # Bidirectional is for privileged containers alone: the host has to have it mounted.
  - {name: bpf, mountPath: /sys/fs/bpf, mountPropagation: HostToContainer}
  - {name: cgroup, mountPath: /sys/fs/cgroup, readOnly: true, mountPropagation: HostToContainer}
  - {name: api, mountPath: /var/run/secrets/kubernetes.io/serviceaccount, readOnly: true}
  {{- if $root.Values.authority.enabled }}
  - {name: proof, mountPath: /var/run/secrets/postern, readOnly: true}
  - {name: roots, mountPath: /etc/postern/roots, readOnly: true}
  {{- end }}
  {{- range $namespace, $secret := $root.Values.agent.secrets }}
  - {name: secret-{{ $namespace }}, mountPath: /etc/postern/secrets/{{ $namespace }}, readOnly: true}
  {{- end }}
{{- end }}

{{/* Writes files of the host, or takes them away, and may nothing else. */}}
{{- define "postern.guardContainer" -}}
image: {{ include "postern.image" .root }}
imagePullPolicy: {{ .root.Values.image.pullPolicy }}
args: {{ toJson .args }}
resources:
  requests: {cpu: 10m, memory: 32Mi}
  limits: {memory: 256Mi}
securityContext:
  privileged: false
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  runAsUser: 0
  runAsGroup: 0
  capabilities: {drop: [ALL]}
volumeMounts:
  - {name: config, mountPath: /etc/postern/agent, readOnly: true}
  - {name: opt, mountPath: /host/opt/postern}
  - {name: units, mountPath: /host/etc/systemd/system}
{{- end }}
