from django.urls import path

from apps.adaptations import api

urlpatterns = [
    path("runs/<str:uid>/snapshot", api.Snapshot.as_view()),
    path("runs/<str:uid>/adaptations", api.Proposals.as_view()),
    path("runs/<str:uid>/ask-for-remedy", api.AskForRemedy.as_view()),
    path("runs/<str:uid>/decisions", api.Decisions.as_view()),
    path("decisions/<str:uid>/snapshot", api.DecisionSnapshot.as_view()),
    path("adaptations/<str:uid>/snapshot", api.AdaptationSnapshot.as_view()),
    path("runs/<str:uid>/declines", api.Declines.as_view()),
    path("adaptations", api.Adaptations.as_view()),
    path("adaptations/reject", api.BulkReject.as_view()),
    path("adaptations/<str:uid>", api.AdaptationDetail.as_view()),
    path("adaptations/<str:uid>/attestation", api.Attestation.as_view()),
    path("adaptations/<str:uid>/approve", api.ApproveAdaptation.as_view()),
    path("adaptations/<str:uid>/reject", api.RejectAdaptation.as_view()),
    path("adaptations/<str:uid>/claim", api.ClaimAdaptation.as_view()),
    path("adaptations/<str:uid>/release", api.ReleaseAdaptation.as_view()),
    path("adaptations/<str:uid>/extend", api.ExtendAdaptation.as_view()),
    path("adaptations/<str:uid>/assign", api.AssignAdaptation.as_view()),
    path("adaptations/<str:uid>/escalate", api.EscalateAdaptation.as_view()),
    path("adaptations/<str:uid>/snooze", api.SnoozeAdaptation.as_view()),
    path("adaptations/<str:uid>/dry-run", api.ReadDryRun.as_view()),
    path("adaptations/<str:uid>/cancel", api.CancelAdaptation.as_view()),
    path("adaptations/<str:uid>/rollback", api.RollBackAdaptation.as_view()),
    path("adaptations/<str:uid>/verdict", api.VerdictOnAdaptation.as_view()),
    path("runs/<str:uid>/pause-adaptation", api.PauseAdaptation.as_view()),
    path("runs/<str:uid>/resume-adaptation", api.ResumeAdaptation.as_view()),
    path("adaptation-switch", api.Switch.as_view()),
    path("experience", api.Experiences.as_view()),
    path("integration-status", api.IntegrationStatus.as_view()),
]
