{{/* Names are fixed: a node has one agent, a trust domain one authority. */}}

{{- define "postern.labels" -}}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version | replace "+" "_" }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
app.kubernetes.io/part-of: postern
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
{{ include "postern.selector" . }}
{{- end }}

{{- define "postern.selector" -}}
app.kubernetes.io/name: postern
app.kubernetes.io/component: {{ .component }}
{{- end }}

{{- define "postern.image" -}}
{{- $image := .Values.image -}}
{{- if $image.digest -}}
{{ $image.repository }}@{{ $image.digest }}
{{- else -}}
{{ $image.repository }}:{{ $image.tag | default .Chart.AppVersion }}
{{- end -}}
{{- end }}

{{- define "postern.issuer" -}}
{{- $own := printf "https://postern-authority.%s.svc.%s:8443" .Release.Namespace .Values.clusterDomain -}}
{{- .Values.authority.issuer | default $own -}}
{{- end }}

{{- define "postern.agentConfig" -}}
trustDomain: {{ .Values.trustDomain | quote }}
state: /var/lib/postern
enrol: {default: {{ .Values.mesh.default }}}
workloads: {source: kubernetes}
policies: {source: kubernetes, rootNamespace: {{ .Values.policies.rootNamespace }}}
kubernetes:
  discovery: {{ .Values.mesh.discovery }}
  podCidrs: {{ toJson .Values.mesh.podCidrs }}
  istio: {{ .Values.policies.istio }}
  {{- with .Values.agent.startupTaint }}
  startupTaint: {{ . | quote }}
  {{- end }}
{{- if .Values.authority.enabled }}
identity:
  authority:
    url: {{ include "postern.issuer" . }}
    roots: /etc/postern/roots/roots.pem
    serviceAccountTokenFile: /var/run/secrets/postern/token
jwt: {roots: /etc/postern/roots/roots.pem}
{{- end }}
log: {level: {{ .Values.agent.log.level | quote }}, format: {{ .Values.agent.log.format }}}
drain: {timeout: {{ .Values.agent.drainSeconds }}s}
{{- end }}

{{- define "postern.authorityConfig" -}}
issuer: {{ include "postern.issuer" . }}
listen: "0.0.0.0:8443"
state: /var/lib/postern-authority/state
{{- if .Values.authority.database.url }}
database: {{ .Values.authority.database.url | quote }}
{{- end }}
trustDomain: {{ .Values.trustDomain | quote }}
nodes:
  cluster:
    namespace: {{ .Release.Namespace }}
    serviceAccount: postern-agent
    audience: {{ include "postern.issuer" . }}
    rootsConfigMap: postern-roots
log: {level: {{ .Values.authority.log.level | quote }}, format: {{ .Values.authority.log.format }}}
{{- end }}
