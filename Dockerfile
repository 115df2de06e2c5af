# Two images of one file:
#
#   docker build -t nginx-consul .                          nginx, the official image with the module
#   docker build -t nginx-consul-registrar --target registrar .
#
# NGINX_VERSION may be any from 1.27.3. The module is built with the source of the very same version: the one of the crate
# nginx-src where that has it (Cargo.lock says which), or an archive of your own choice:
#
#   docker build --build-arg NGINX_VERSION=1.30.2 \
#                --build-arg NGINX_SOURCE=https://nginx.org/download/nginx-1.30.2.tar.gz \
#                --build-arg NGINX_SOURCE_SHA256=... .

ARG NGINX_VERSION=1.28.3

# ---- what both builds begin with

FROM rust:1-bookworm AS toolchain
RUN apt-get update \
 && apt-get install -y --no-install-recommends libclang-dev libpcre2-dev libssl-dev zlib1g-dev \
 && rm -rf /var/lib/apt/lists/*
WORKDIR /src

# All manifests, and of the sources the names alone: as long as these stay, the layers with the dependencies do.
FROM toolchain AS manifests
COPY . .
RUN docker/hollow-out

# ---- the registrar

FROM toolchain AS registrar-build
COPY --from=manifests /src .
RUN cargo build --release --locked --package registrar
COPY . .
# Files that are older than what was built of the hollow ones would count as unchanged.
RUN find . -name '*.rs' -exec touch {} + \
 && cargo build --release --locked --package registrar

FROM debian:bookworm-slim AS registrar
# The authorities, for agents that are asked by https, without the packages that keep them.
COPY --from=toolchain /etc/ssl/certs/ca-certificates.crt /etc/ssl/certs/
RUN useradd --system --uid 10001 --no-create-home --home-dir /nonexistent --shell /usr/sbin/nologin registrar
COPY --from=registrar-build /src/target/release/registrar /usr/local/bin/registrar
LABEL org.opencontainers.image.title="registrar" \
      org.opencontainers.image.description="Keeps a Consul agent's services equal to the containers of its host" \
      org.opencontainers.image.licenses="Apache-2.0"
USER registrar
ENTRYPOINT ["/usr/local/bin/registrar"]

# ---- the module

FROM toolchain AS module-build
ARG NGINX_VERSION
ARG NGINX_SOURCE=
ARG NGINX_SOURCE_SHA256=
COPY docker/nginx-source docker/nginx-source
COPY Cargo.lock .
RUN docker/nginx-source /nginx
COPY --from=manifests /src .
RUN . /nginx/environment && cargo build --release --locked $CARGO_FLAGS -p nginx-consul-upstream
COPY . .
RUN find . -name '*.rs' -exec touch {} + \
 && . /nginx/environment && cargo build --release --locked $CARGO_FLAGS -p nginx-consul-upstream

# ---- nginx: the last one, so that it is what is built by default

FROM nginx:${NGINX_VERSION} AS nginx
ARG NGINX_VERSION
COPY --from=module-build /src/target/release/libngx_http_consul_upstream_module.so \
     /usr/lib/nginx/modules/ngx_http_consul_upstream_module.so
COPY docker/05-consul-upstream.envsh /docker-entrypoint.d/
COPY docker/consul.conf.template /usr/share/nginx-consul-upstream/
# The official nginx.conf with one line more: load_module cannot come from conf.d. What was stored of the peers is in a
# volume, where the module looks for it by default.
RUN sed -i '1i load_module modules/ngx_http_consul_upstream_module.so;\n' /etc/nginx/nginx.conf \
 && cp /etc/nginx/conf.d/default.conf /usr/share/nginx-consul-upstream/stock.conf \
 && install -d -o nginx -m 700 /var/lib/nginx-consul-upstream \
 && ln -s /var/lib/nginx-consul-upstream /etc/nginx/consul_state \
 && nginx -t
VOLUME /var/lib/nginx-consul-upstream
# Any answer will do, whatever it says: an nginx whose upstreams are empty, or that has no such location, is well.
HEALTHCHECK --interval=10s --timeout=5s --start-period=5s \
  CMD curl --silent --output /dev/null --max-time 4 "http://127.0.0.1:${NGINX_PORT:-80}/nginx-health"
LABEL org.opencontainers.image.title="nginx with consul_upstream" \
      org.opencontainers.image.description="nginx whose upstreams are Consul services, live" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.base.name="docker.io/library/nginx:${NGINX_VERSION}"
