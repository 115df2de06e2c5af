/* http's part of common.h */

#include <ngx_http.h>

#if !(NGX_HTTP_UPSTREAM_ZONE)
#error "nginx is configured --without-http_upstream_zone_module, which this module needs"
#endif

#if (NGX_HTTP_UPSTREAM_SID)
enum {
    /* peers have a session id, for "sticky" (1.29.6 and later, where it is not configured out) */
    NGINX_PEERS_SID_LEN = NGX_HTTP_UPSTREAM_SID_LEN
};
#endif

/*
 * Bits of a request. In nginx 1.30 they begin in the second half of a word, and there bindgen places those behind
 * the first word elsewhere than the compiler: by two bits, which are other flags.
 */

static inline ngx_uint_t
nginx_request_is_header_only(const ngx_http_request_t *r)
{
    return r->header_only;
}

static inline void
nginx_request_set_header_only(ngx_http_request_t *r)
{
    r->header_only = 1;
}

static inline void
nginx_request_disable_not_modified(ngx_http_request_t *r)
{
    r->disable_not_modified = 1;
}

/* one more that has to finalize it */
static inline void
nginx_request_hold(ngx_http_request_t *r)
{
    r->main->count++;
}
