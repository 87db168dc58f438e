{{- define "finetune.name" -}}
{{- if contains "finetune-operator" .Release.Name }}{{ .Release.Name | trunc 52 | trimSuffix "-" }}
{{- else }}{{ printf "%s-finetune-operator" .Release.Name | trunc 52 | trimSuffix "-" }}{{ end -}}
{{- end -}}

{{- /* Of objects without a namespace: two releases of one name in two namespaces must not meet. */ -}}
{{- define "finetune.clusterName" -}}
{{ .Release.Namespace }}-{{ include "finetune.name" . }}
{{- end -}}

{{- define "finetune.serviceAccount" -}}
{{ .Values.serviceAccount.name | default (include "finetune.name" .) }}
{{- end -}}

{{- /* The NetworkPolicies of jobs let training pods reach pods with this app.kubernetes.io/name (render/network.py). */ -}}
{{- define "finetune.selector" -}}
app.kubernetes.io/name: finetune-operator
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "finetune.labels" -}}
{{ include "finetune.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version }}
{{- end -}}

{{- define "finetune.image" -}}
{{ required "image.reference is not set: it is the operator's own image, e.g. registry.example.com/finetune-operator:0.1.0" .Values.image.reference }}
{{- end -}}
