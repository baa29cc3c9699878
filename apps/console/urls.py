"""Addresses of the pages. Each page is one file in ``pages/``."""

from django.urls import path
from django.views.i18n import set_language

from apps.console.bar import bar, freeze_banner
from apps.console.pages.accessibility import accessibility
from apps.console.pages.adaptation import adaptation
from apps.console.pages.audit import audit
from apps.console.pages.blueprints import blueprint, blueprints
from apps.console.pages.compare import compare
from apps.console.pages.duty import duty
from apps.console.pages.identity import identity
from apps.console.pages.inbox import inbox
from apps.console.pages.incidents import incidents_page
from apps.console.pages.kernel import kernel
from apps.console.pages.kernels import kernels
from apps.console.pages.me import me, save_my_settings, save_my_view
from apps.console.pages.overview import overview
from apps.console.pages.people import people
from apps.console.pages.plan import plan
from apps.console.pages.policy import policy
from apps.console.pages.projects import projects
from apps.console.pages.provider import provider_callback, provider_sign_in
from apps.console.pages.recipes import launch, recipe, recipes
from apps.console.pages.report import report
from apps.console.pages.run import run
from apps.console.pages.runs import runs
from apps.console.pages.search import search
from apps.console.pages.second_factor import second_factor
from apps.console.pages.sign_in import SignIn, SignOut, sign_in_code
from apps.console.pages.step_up import step_up
from apps.console.pages.switch import switch
from apps.console.pages.system_status import system_status
from apps.console.pages.violations import violations
from apps.console.pages.wall import wall
from apps.console.pages.workers import workers
from apps.console.words import words

app_name = "console"
urlpatterns = [
    path("login", SignIn.as_view(), name="sign-in"),
    path("login/provider", provider_sign_in, name="provider-sign-in"),
    path("login/provider/callback", provider_callback, name="provider-callback"),
    path("login/code", sign_in_code, name="sign-in-code"),
    path("logout", SignOut.as_view(), name="sign-out"),
    path("language", set_language, name="set-language"),
    path("words.js", words, name="words"),
    path("bar", bar, name="bar"),
    path("bar/freezes", freeze_banner, name="freeze-banner"),
    path("", overview, name="overview"),
    path("inbox", inbox, name="inbox"),
    path("runs", runs, name="runs"),
    path("runs/compare", compare, name="compare"),
    path("runs/<str:uid>", run, name="run"),
    path("adaptations/<str:uid>", adaptation, name="adaptation"),
    path("plans/<str:uid>", plan, name="plan"),
    path("blueprints", blueprints, name="blueprints"),
    path("blueprints/<slug:slug>", blueprint, name="blueprint"),
    path("incidents", incidents_page, name="incidents"),
    path("switch", switch, name="switch"),
    path("violations", violations, name="violations"),
    path("policy", policy, name="policy"),
    path("workers", workers, name="workers"),
    path("kernels", kernels, name="kernels"),
    path("kernels/<str:digest>", kernel, name="kernel"),
    path("recipes", recipes, name="recipes"),
    path("recipes/<str:uid>", recipe, name="recipe"),
    path("launches/<str:uid>", launch, name="launch"),
    path("audit", audit, name="audit"),
    path("me", me, name="me"),
    path("me/settings", save_my_settings, name="save-settings"),
    path("me/views", save_my_view, name="save-view"),
    path("me/identity", identity, name="identity"),
    path("me/second-factor", second_factor, name="second-factor"),
    path("step-up", step_up, name="step-up"),
    path("duty", duty, name="duty"),
    path("people", people, name="people"),
    path("projects", projects, name="projects"),
    path("search", search, name="search"),
    path("status", system_status, name="status"),
    path("wall", wall, name="wall"),
    path("report", report, name="report"),
    path("accessibility", accessibility, name="accessibility"),
]
