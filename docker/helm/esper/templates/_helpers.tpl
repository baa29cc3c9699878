{{- define "esper.labels" -}}
app.kubernetes.io/name: esper
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ .root.Chart.Name }}-{{ .root.Chart.Version }}
{{- end }}

{{- define "esper.selector" -}}
app.kubernetes.io/name: esper
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
{{- end }}

{{- define "esper.claim" -}}
{{ .Values.data.existingClaim | default (printf "%s-data" .Release.Name) }}
{{- end }}

{{/* Which files of the Secret a component gets, and which settings name them: as docker/compose.yaml has it. */}}
{{- define "esper.secretsOf" -}}
{{- $compile := dict
    "DATABASE_URL" "compile_database_url"
    "REDIS_URL" "redis_compile_url"
    "ESPER_KERNEL_PUBLIC_KEY" "kernel_public_key"
    "ESPER_KERNEL_KEY" "kernel_key" -}}
{{- $server := dict
    "SECRET_KEY" "secret_key"
    "DATABASE_URL" "database_url"
    "REDIS_URL" "redis_url"
    "ESPER_COMMAND_KEY" "command_key"
    "ESPER_AUDIT_KEY" "audit_key"
    "ESPER_KERNEL_PUBLIC_KEY" "kernel_public_key"
    "ESPER_METRICS_TOKEN" "metrics_token" -}}
{{- $owner := merge (dict "DATABASE_URL" "database_owner_url") $server -}}
{{- $tamiyo := dict "REDIS_URL" "redis_tamiyo_url" "ESPER_TOKEN" "tamiyo_token" -}}
{{- $web := merge (dict "ESPER_OIDC_CLIENT_SECRET" "oidc_client_secret") $server -}}
{{- $all := dict "web" $web "compile" $compile "migrate" $owner "tamiyo" $tamiyo -}}
{{- toJson (get $all . | default $server) -}}
{{- end }}

{{- define "esper.environment" -}}
{{- $secrets := include "esper.secretsOf" .component | fromJson -}}
{{- range $name, $file := $secrets }}
- {name: {{ $name }}_FILE, value: /run/secrets/{{ $file }}}
{{- end }}
{{- if ne .component "tamiyo" }}
- {name: DJANGO_SETTINGS_MODULE, value: esper_web.settings.production}
- {name: ESPER_DATA_DIR, value: /var/lib/esper}
- {name: ESPER_HOST_NAME, value: {{ .root.Release.Name | quote }}}
# Prometheus asks each pod by its address.
- {name: POD_IP, valueFrom: {fieldRef: {fieldPath: status.podIP}}}
- {name: ALLOWED_HOSTS, value: "{{ .root.Values.host }},{{ .root.Release.Name }}-web,127.0.0.1,$(POD_IP)"}
- {name: CSRF_TRUSTED_ORIGINS, value: "https://{{ .root.Values.host }}"}
{{- range $name, $value := .root.Values.settings }}
- {name: {{ $name }}, value: {{ $value | quote }}}
{{- end }}
{{- if eq .component "web" }}
{{- range $name := list "ESPER_TOTP_REQUIRED_ROLES" "ESPER_OIDC_ISSUER" "ESPER_OIDC_CLIENT_ID" "ESPER_OIDC_ROLES" "ESPER_OIDC_GROUPS_CLAIM" "ESPER_OIDC_SCOPES" "ESPER_OIDC_NAME" }}
- {name: {{ $name }}, value: {{ get $.root.Values.signIn $name | default "" | quote }}}
{{- end }}
{{- end }}
{{- end }}
{{- end }}

{{/* Restricted, as the Pod Security Standards have it, and more: no service writes to its image. */}}
{{- define "esper.container" -}}
imagePullPolicy: {{ .root.Values.images.pullPolicy }}
securityContext:
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  capabilities: {drop: [ALL]}
env:
{{- include "esper.environment" . | trim | nindent 2 }}
volumeMounts:
  - {name: secrets-of-{{ .component }}, mountPath: /run/secrets, readOnly: true}
  - {name: tmp, mountPath: /tmp}
{{- if ne .component "tamiyo" }}
  - {name: own, mountPath: /var/lib/esper}
{{- end }}
{{- if has .component (list "web" "control" "compile") }}
  - {name: data, mountPath: /var/lib/esper/kernels, subPath: kernels}
{{- end }}
{{- if has .component (list "web" "control") }}
  - {name: data, mountPath: /var/lib/esper/audit, subPath: audit}
{{- end }}
{{- end }}

{{- define "esper.secretVolume" -}}
- name: secrets-of-{{ .component }}
  secret:
    secretName: {{ .root.Values.secrets }}
    defaultMode: 0440
    items:
{{- range $file := include "esper.secretsOf" .component | fromJson | values | sortAlpha }}
      - {key: {{ $file }}, path: {{ $file }}}
{{- end }}
{{- end }}

{{- define "esper.pod" -}}
automountServiceAccountToken: false
enableServiceLinks: false
{{- with .root.Values.images.pullSecrets }}
imagePullSecrets: {{ toJson . }}
{{- end }}
securityContext:
  runAsNonRoot: true
  runAsUser: 10001
  runAsGroup: 10001
  fsGroup: 10001
  fsGroupChangePolicy: OnRootMismatch
  seccompProfile: {type: RuntimeDefault}
{{- end }}

{{- define "esper.volumes" -}}
{{- include "esper.secretVolume" . }}
- {name: tmp, emptyDir: {sizeLimit: {{ ternary "4Gi" "512Mi" (eq .component "compile") }}}}
{{- if ne .component "tamiyo" }}
- {name: own, emptyDir: {}}
{{- end }}
{{- if has .component (list "web" "control" "compile") }}
- {name: data, persistentVolumeClaim: {claimName: {{ include "esper.claim" .root }}}}
{{- end }}
{{- end }}

{{/* Celery's answer, as in docker/compose.yaml. */}}
{{- define "esper.answers" -}}
exec:
  command:
    - sh
    - -c
    - python -m celery --quiet -A esper_web.celery inspect ping --timeout 10 -d "{{ . }}@$HOSTNAME"
initialDelaySeconds: 60
periodSeconds: 60
timeoutSeconds: 30
failureThreshold: 3
{{- end }}
