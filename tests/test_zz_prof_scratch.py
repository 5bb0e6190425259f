import cProfile, pstats, time, run
def test_p(workspace):
    p = [str(workspace.yaml(batch_size_training=2, name="w", num_epochs=1))]
    run.main(p)
    t=time.process_time(); w=time.perf_counter()
    pr=cProfile.Profile(); pr.enable()
    run.main([str(workspace.yaml(batch_size_training=2, save_every_steps=2))])
    pr.disable()
    print("CPU", time.process_time()-t, "wall", time.perf_counter()-w)
    pstats.Stats(pr).sort_stats("cumtime").print_stats(45)
