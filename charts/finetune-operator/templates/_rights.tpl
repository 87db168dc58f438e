{{- /*
What the operator does to jobs and their children, and no more (access.py asks for the same at start). It never writes spec, reads no secret of
a tenant, and leaves the children of a deleted job to the garbage collector.
*/ -}}
{{- define "finetune.rights" -}}
- apiGroups: [finetune.dev]
  resources: [finetunejobs]
  verbs: [get, list, watch, delete]
- apiGroups: [finetune.dev]
  resources: [finetunejobs/status]
  verbs: [patch]
- apiGroups: [""]
  resources: [pods]
  verbs: [get, list, watch, create, delete]
- apiGroups: [""]
  resources: [configmaps]
  verbs: [create, patch]
- apiGroups: [networking.k8s.io]
  resources: [networkpolicies]
  verbs: [create, patch]
{{- end -}}

{{- define "finetune.subject" -}}
- kind: ServiceAccount
  name: {{ include "finetune.serviceAccount" . }}
  namespace: {{ .Release.Namespace }}
{{- end -}}
