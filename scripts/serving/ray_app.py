"""`serve run --app-dir scripts serving.ray_app:create_service`, under the name that it had."""

from visualglm_tools.serving.http.ray_app import create_service


__all__ = ["create_service"]
