/* A test double of a container plugin: it knows pyxis' options, fails on a node where the image or a mount's source is
 * missing, and otherwise runs the task as it is with CONTAINER_GIVEN=image|mounts in its environment.
 * It says nothing about what real containers do. Build: gcc -shared -fPIC -o containers.so containers.c */
#include <slurm/spank.h>
#include <slurm/slurm.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

SPANK_PLUGIN(containers, 1)

static char *image, *mounts;

static int take(int which, const char *argument, int remote) {
    (void)remote;
    if (which == 0) image = strdup(argument);
    if (which == 1) mounts = strdup(argument);
    return 0;
}

int slurm_spank_init(spank_t spank, int argc, char **argv) {
    (void)argc; (void)argv;
    struct spank_option options[] = {
        {"container-image", "PATH", "image", 1, 0, take},
        {"container-mounts", "LIST", "mounts", 1, 1, take},
        {"container-workdir", "PATH", "folder", 1, 2, take},
        {"container-env", "NAMES", "variables", 1, 3, take},
        {"no-container-mount-home", NULL, "no home", 0, 4, take},
        {"container-writable", NULL, "writable", 0, 5, take},
    };
    for (unsigned i = 0; i < sizeof options / sizeof options[0]; i++)
        if (spank_option_register(spank, &options[i]) != ESPANK_SUCCESS) return -1;
    return 0;
}

static int missing(const char *path) {
    if (!access(path, R_OK)) return 0;
    slurm_error("containers: no such file or directory: %s", path);
    return 1;
}

int slurm_spank_user_init(spank_t spank, int argc, char **argv) {
    (void)argc; (void)argv;
    if (spank_context() != S_CTX_REMOTE || !image) return 0;
    if (image[0] == '/' && missing(image)) return -1;
    char given[8192];
    snprintf(given, sizeof given, "%s|%s", image, mounts ? mounts : "");
    char *rest = mounts ? strdup(mounts) : NULL, *mount;
    while (rest && (mount = strsep(&rest, ","))) {
        mount[strcspn(mount, ":")] = 0;
        if (missing(mount)) return -1;
    }
    spank_setenv(spank, "CONTAINER_GIVEN", given, 1);
    return 0;
}
