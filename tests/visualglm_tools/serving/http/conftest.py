"""What tests of OpenAI's routes share: its official client on the shared engine."""

import openai
import pytest


@pytest.fixture
def client(url):
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client
