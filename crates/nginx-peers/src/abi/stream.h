/* stream's part of common.h, where nginx is configured with it */

#include <ngx_config.h>
#include <ngx_core.h>

#if __has_include(<ngx_stream.h>)
#include <ngx_stream.h>
#endif
