from django.urls import path

from apps.recipes import api

urlpatterns = [
    path("recipes", api.Recipes.as_view()),
    path("recipes/<str:uid>", api.RecipeDetail.as_view()),
    path("runs/<str:uid>/branches", api.Branches.as_view()),
    path("launches", api.Launches.as_view()),
    path("launches/<str:uid>", api.LaunchDetail.as_view()),
    path("launches/<str:uid>/stop", api.StopLaunch.as_view()),
    path("launches/<str:uid>/resume", api.ResumeLaunch.as_view()),
    path("launches/<str:uid>/log", api.LaunchLog.as_view()),
]
