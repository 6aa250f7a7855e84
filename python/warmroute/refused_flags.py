"""Flags of sglang-router that are understood and refused, each with the reason: a start-up script must not believe that
something is switched on which is not.
"""

from typing import Final

_NOT_YET: Final = "not in this version"

REFUSED_FLAGS: Final[dict[str, str]] = {
    flag: reason
    for reason, flags in {
        "prefill/decode disaggregation is not built": (
            "pd-disaggregation mini-lb prefill decode prefill-policy decode-policy prefill-selector decode-selector"
        ),
        "the bucket policy (prefill/decode disaggregation) is not built": "bucket-adjust-interval-secs",
        "several models are always served, by the names their workers tell: leave it out": "enable-igw",
        "the router does not tokenize: it forwards the body as it came": (
            "model-path tokenizer-path chat-template tokenizer-cache-enable-l0 tokenizer-cache-l0-max-entries "
            "tokenizer-cache-enable-l1 tokenizer-cache-l1-max-memory"
        ),
        "parsing answers is the worker's task: give it to the workers": "reasoning-parser tool-call-parser",
        "MCP is not built": "mcp-config-path",
        "WASM middleware is not built": "enable-wasm storage-hook-wasm-path wasm-middleware",
        "workers are SGLang, vLLM or our own, found by asking them": "backend",
        "chat histories are not stored": (
            "history-backend oracle-wallet-path oracle-tns-alias oracle-connect-descriptor oracle-username "
            "oracle-password oracle-pool-min oracle-pool-max oracle-pool-timeout-secs postgres-db-url "
            "postgres-pool-max redis-url redis-pool-max redis-retention-days"
        ),
        "a mesh of routers is not built": "enable-mesh mesh-server-name mesh-host mesh-port mesh-peer-urls",
        "JWT and control-plane roles are not built; --api-key protects everything": (
            "control-plane-api-keys control-plane-audit-enabled jwt-issuer jwt-audience jwt-jwks-uri jwt-role-mapping"
        ),
        f"service discovery is {_NOT_YET}; register workers with POST /workers": (
            "service-discovery selector service-discovery-port service-discovery-namespace"
        ),
        f"serving TLS is {_NOT_YET}; put a TLS proxy in front": (
            "tls-cert-path tls-key-path client-cert-path client-key-path ca-cert-paths"
        ),
        f"tracing is {_NOT_YET}; traceparent is forwarded": "enable-trace otlp-traces-endpoint",
        f"CORS is {_NOT_YET}": "cors-allowed-origins",
        f"log files are {_NOT_YET}; the log goes to standard error": "log-dir",
    }.items()
    for flag in flags.split()
}
