"""The options that say where processes listen and whom they reach."""

from typing import Annotated, Literal

import typer

from epserve.options.checks import advertised, at_least, one_address, several_addresses

DEFAULT_GRPC_PORT = 50051
DEFAULT_CLUSTER_PORT = 50052
DEFAULT_HTTP_PORT = 8000
DEFAULT_TARGET = f"127.0.0.1:{DEFAULT_GRPC_PORT}"
DEFAULT_REGISTRY = "embedded"
MAX_PORT = 65_535

NETWORK = "Network"
Transport = Literal["auto", "nixl", "grpc"]

TransportOption = Annotated[
    Transport,
    typer.Option(
        help="How tensors travel between the tiers. auto: nixl, else grpc.", rich_help_panel=NETWORK
    ),
]
HostOption = Annotated[str, typer.Option(help="Address to listen on.", rich_help_panel=NETWORK)]
GrpcPortOption = Annotated[
    int,
    typer.Option(
        callback=at_least(0, MAX_PORT),
        help="The gateway's gRPC port; 0: any free one.",
        rich_help_panel=NETWORK,
    ),
]
HttpPortOption = Annotated[
    int,
    typer.Option(
        callback=at_least(0, MAX_PORT),
        help="The gateway's HTTP port; 0: any free one.",
        rich_help_panel=NETWORK,
    ),
]
WorkerPortOption = Annotated[
    int,
    typer.Option(
        callback=at_least(0, MAX_PORT),
        help="This process's own port; 0: any free one.",
        rich_help_panel=NETWORK,
    ),
]
GatewayOption = Annotated[
    str,
    typer.Option(
        callback=several_addresses,
        help="HOST:PORT of the gateway to register with; of all gateways that share a registry, "
        "with commas between them.",
        rich_help_panel=NETWORK,
    ),
]
RegistryOption = Annotated[
    str,
    typer.Option(
        help="Where gateways of one cluster find each other: embedded (there is one gateway), or "
        "etcd://HOST:PORT[,HOST:PORT…][/NAME], NAME being the cluster's.",
        rich_help_panel=NETWORK,
    ),
]
AdvertiseOption = Annotated[
    str | None,
    typer.Option(
        callback=advertised,
        help="HOST or HOST:PORT where peers reach this process, if not where it listens.",
        rich_help_panel=NETWORK,
    ),
]
ClusterPortOption = Annotated[
    int,
    typer.Option(
        callback=at_least(0, MAX_PORT),
        help="With TLS, the gateway's port for attn and expert; --grpc-port is for clients then.",
        rich_help_panel=NETWORK,
    ),
]
TargetOption = Annotated[
    str, typer.Option(callback=one_address, help="HOST:PORT of a gateway.", rich_help_panel=NETWORK)
]
