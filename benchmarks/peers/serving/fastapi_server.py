"""FastAPI on uvicorn: ``python fastapi_server.py PORT``."""

import sys

import numpy as np
import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel


class Input(BaseModel):
    name: str
    shape: list[int]
    datatype: str
    data: list[float]


class Request(BaseModel):
    inputs: list[Input]


application = FastAPI()


@application.get("/health")
async def health() -> dict:
    return {}


@application.post("/infer")
async def infer(request: Request) -> dict:
    given = request.inputs[0]
    array = np.array(given.data, np.float32).reshape(given.shape)
    output = {"name": "y", "datatype": "FP32", "shape": list(array.shape), "data": array.ravel().tolist()}
    return {"outputs": [output]}


if __name__ == "__main__":
    uvicorn.run(application, host="127.0.0.1", port=int(sys.argv[1]), log_level="error", access_log=False)
