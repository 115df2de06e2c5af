/*
 * What nginx-sys lacks, because nginx has it as static inline functions and macros: here for all protocols, and in a
 * file of its own for each. bindgen makes callable wrappers of the functions, so that the code is nginx's own, of the
 * version at hand.
 */

#include <ngx_config.h>
#include <ngx_core.h>
#include <ngx_event.h>
#include <ngx_event_connect.h>

enum {
    /* the size of every peer's name in shared memory */
    NGINX_PEERS_SOCKADDR_STRLEN = NGX_SOCKADDR_STRLEN
};

/* what a choice of peer leaves in a connection for "sticky" */
static inline void
nginx_peer_connection_forget_choice(ngx_peer_connection_t *pc)
{
#if (nginx_version >= 1029006) && (NGX_HTTP_UPSTREAM_SID || NGX_COMPAT)
    pc->hint = NULL;
    pc->sid = NULL;
#else
    (void) pc;
#endif
}
