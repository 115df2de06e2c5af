/*
 * What nginx-sys lacks, because nginx has it as static inline functions and macros: here for all protocols, and in a
 * file of its own for each. bindgen makes callable wrappers of the functions, so that the code is nginx's own, of the
 * version at hand.
 */

#include <ngx_config.h>
#include <ngx_core.h>

enum {
    /* the size of every peer's name in shared memory */
    NGINX_PEERS_SOCKADDR_STRLEN = NGX_SOCKADDR_STRLEN
};
